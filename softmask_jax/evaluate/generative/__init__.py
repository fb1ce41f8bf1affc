"""Quality of generated text: perplexity under GPT-2, entropy, MAUVE."""
