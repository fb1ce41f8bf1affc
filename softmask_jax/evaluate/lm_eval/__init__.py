"""Our models in lm-evaluation-harness. `import lm_eval` is the harness's own package everywhere, in here too."""
