"""The one train loop. Mesh, model and objective come from the config; a killed run started again continues bit-exactly."""
import collections
import dataclasses
import json
import signal
from pathlib import Path

import jax
import numpy as np

from softmask_jax import checkpoint, data, denoiser, optimizer, sharding, train_state, train_step
from softmask_jax.config import Config
from softmask_jax.diffusion import Stream, row_keys, stream_key
from softmask_jax.evaluation.perplexity import Nats, Perplexity
from softmask_jax.run_folder import RunFolder, write_json
from softmask_jax.samplers import Ancestral
from softmask_jax.soft_masking import effective
from softmask_jax.tracking import Clock, Tracker, peak_flops, summarise
from softmask_jax.train_state import TrainState

CLOSED_LAMBDA = 0.01
PROFILED_STEPS = range(3, 8)


class NonFinite(RuntimeError):
    """A loss, gradient or parameter stopped being finite; nothing of it was saved."""


def train(config: Config, workdir: str, *, profile: bool = False) -> dict:
    """Train, or continue, the run in `workdir`.

    Returns:
      The summary, as in summary.json; {"finished": False, "step": n} where SIGTERM or Ctrl-C ended it.

    Raises:
      ValueError, FileNotFoundError, OSError: config, data, mesh or checkpoint don't fit; the message says what to do.
      NonFinite: names the step and the last good checkpoint.
    """
    sharding.start_hosts()
    with RunFolder(workdir) as folder:
        for line in folder.check_config(config.to_dict()):
            print(line)
        summary = folder.path / "summary.json"
        if summary.exists() and (done := json.loads(summary.read_text()))["step"] >= config.train.steps:
            print(f"This run is done ({done['step']} steps). Another --workdir, or more train.steps, trains again.\n")
            return done
        trainer = Trainer(config, folder, profile=profile)
        try:
            return trainer.run()
        finally:
            trainer.close()


class Trainer:
    """One process's part in a run. `__init__` builds what doesn't change, `run` restores, loops and finishes."""

    def __init__(self, config: Config, folder: RunFolder, *, profile: bool = False):
        self.config, self.folder, self.profile = config, folder, profile
        self.mesh = sharding.make_mesh(**dataclasses.asdict(config.mesh))
        micro = config.train.global_batch_size // config.train.micro_batches
        sharding.check_batch("A micro-batch (config.train.global_batch_size / micro_batches)", micro, self.mesh)
        sharding.check_batch("config.eval.batch_size", config.eval.batch_size, self.mesh)
        if config.train.compilation_cache:
            jax.config.update("jax_compilation_cache_dir", config.train.compilation_cache)
        self.data = data.build(config.data)
        self.tokenizer = self.data.tokenizer
        self.denoiser = denoiser.build(
            config.model, config.soft_mask, mesh=self.mesh,
            vocab_size=self.tokenizer.vocab_size, mask_token_id=self.tokenizer.mask_token_id,
        )  # fmt: skip
        self.tx = optimizer.make(config.optimizer, config.train.steps)
        step = train_step.make(config, self.denoiser, self.tx)
        self.perplexity = Perplexity(self.denoiser, step.spec, self.mesh)
        self.sampler = Ancestral(
            self.denoiser, step.spec, steps=config.sample.steps, nucleus_p=config.sample.nucleus_p
        )
        self.step = jax.jit(step, donate_argnums=0)
        self.sample_fn = jax.jit(self.sampler)
        self.root_key = jax.random.key(config.train.seed)
        self.peak = peak_flops(jax.devices()[0]) * jax.device_count()
        self.checkpoints = checkpoint.Checkpoints(
            folder.path / "checkpoints", keep=config.checkpoint.keep, keep_best=config.checkpoint.keep_best
        )
        self.tracker = None
        self.stopping = False

    def run(self) -> dict:
        config, folder = self.config, self.folder
        state, start = self._restore_or_initialise()
        folder.write_config(config.to_dict())
        folder.write_versions()
        self.tokenizer.save(folder.path / "tokenizer")
        folder.truncate_metrics(start)
        self._say_what_starts(start)
        self.tracker = Tracker(folder, steps=config.train.steps, start=start)
        handlers = {number: signal.signal(number, self._stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            state = self._loop(state, start)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        self.checkpoints.wait()
        if self.stopping and int(state.step) < config.train.steps:
            self.tracker.say(f"Stopped and saved at step {int(state.step)}; the same command continues from there.")
            return {"finished": False, "step": int(state.step)}
        return self._finish(state)

    def close(self) -> None:
        if self.tracker is not None:
            self.tracker.close()
        self.checkpoints.close()

    def _loop(self, state: TrainState, start: int) -> TrainState:
        config = self.config
        batches = data.batches(
            self.data.train, global_batch_size=config.train.global_batch_size, seed=config.train.seed,
            start_step=start, host_index=jax.process_index(), host_count=jax.process_count(),
            prefetch=config.data.prefetch,
        )  # fmt: skip
        pending, in_flight, clock = [], collections.deque(), Clock()
        for step, batch in zip(range(start + 1, config.train.steps + 1), batches):
            self._profile_step(step - start)
            state, metrics = self.step(state, sharding.global_batch(batch, self.mesh), self.root_key)
            pending.append(metrics)
            in_flight.append(metrics.loss)
            if step == start + 1:
                jax.block_until_ready(metrics)
                clock.restart(step)
            if len(in_flight) > 2:  # the device stays busy, and the loop does not run away from it
                in_flight.popleft().block_until_ready()
            self.tracker.progress(step)
            last = step == config.train.steps or self.stopping
            if last or step % config.train.log_every == 0:
                self._log(step, state, pending, clock)
                pending = []
            scores = {}
            if config.eval.every and step % config.eval.every == 0:
                scores = self._validate(step, state)
                clock.restart(step)
            if config.sample.every and config.sample.count and step % config.sample.every == 0:
                self._sample(step, state)
                clock.restart(step)
            if last or step % config.checkpoint.every == 0:
                self._check(step, pending, state)
                cursor = {"step": step, "data": self.data.info["fingerprint"]}
                self.checkpoints.save(step, _trees(state), cursor, scores)
                clock.restart(step)
            if last:
                break
        return state

    def _restore_or_initialise(self) -> tuple[TrainState, int]:
        abstract = train_state.abstract(self.denoiser, self.tx, self.mesh)
        found = self.checkpoints.restore_latest(_trees(abstract))
        if found is not None:
            step, trees, cursor = found
            if cursor["data"] != self.data.info["fingerprint"]:
                raise ValueError(
                    f"The run in {self.folder.path} was trained on other text (files, split, tokenizer or window length "
                    "have changed since, or another Python's stdlib): bring that text back, or use another --workdir."
                )
            count = jax.device_put(np.int32(step), abstract.step.sharding)
            return TrainState(count, trees["params"], trees["ema"], trees["optimizer"]), step
        state = train_state.initialise(self.denoiser, self.tx, self.mesh, self.config.train.seed)
        return (self._start_from(state, abstract) if self.config.init.checkpoint else state), 0

    def _start_from(self, state: TrainState, abstract: TrainState) -> TrainState:
        """Weights of another run; its soft-masking scalars too, if it had learned some. The EMA starts from them."""
        source = Path(self.config.init.checkpoint)
        with RunFolder(source, lock=False) as folder:
            other = folder.read_config()
        if other is None:
            raise FileNotFoundError(f"config.init.checkpoint: no run in {source} (it has no config.json).")
        wanted = {"params": abstract.params, "ema": abstract.ema}
        with checkpoint.Checkpoints(source / "checkpoints") as checkpoints:
            _, trees = checkpoints.restore_params(abstract=wanted)
        backbone = trees["ema"] if self.config.init.weights == "ema" else trees["params"]["backbone"]
        learned = other["soft_mask"]["variant"] != "none"
        scalars = trees["params"]["soft_mask"] if learned else state.params["soft_mask"]
        return state._replace(
            params={"backbone": backbone, "soft_mask": scalars}, ema=jax.tree.map(lambda x: x.copy(), backbone)
        )

    def _log(self, step: int, state: TrainState, pending: list, clock: Clock) -> None:
        self._check(step, pending)
        config, row = self.config, summarise(pending)
        speed = clock.steps_per_second(step) * config.train.global_batch_size * config.data.seq_len
        clock.restart(step)
        flops = speed * (3.0 + row["two_pass_share"]) * self.denoiser.flops_per_token(config.data.seq_len)
        rates = {
            name: float(optimizer.learning_rate(peak, config.optimizer, config.train.steps)(step - 1))
            for name, peak in (
                ("learning_rate", config.optimizer.learning_rate),
                ("sm_learning_rate", config.optimizer.sm_learning_rate),
            )
        }
        scalars = {f"soft_mask/{k}": float(v) for k, v in effective(state.params["soft_mask"])._asdict().items()}
        speeds = {"tokens_per_second": speed, "model_flops_per_second": flops, "model_flops_share": flops / self.peak}
        self.tracker.row(step, "train", row | rates | scalars | speeds)
        self.tracker.progress(step, row["loss"], speed)
        if row.get("lambda_mean", 1.0) < CLOSED_LAMBDA:
            self.tracker.warn_once(
                f"Step {step}: the mean lambda is {row['lambda_mean']:.1e}: soft-masking is still closed, so two passes "
                "do what one would. It opens as soft_mask.scale grows (soft_mask.init_scale starts it higher)."
            )

    def _check(self, step: int, pending: list, state: TrainState | None = None) -> None:
        """Raise NonFinite if any pending step, or the state about to be saved, is not finite."""
        first = step - len(pending) + 1
        bad = [first + i for i, metrics in enumerate(pending) if not bool(metrics.finite)]
        what = "The loss or its gradient"
        if not bad and state is not None and not bool(train_state.all_finite(_trees(state))):
            bad, what = [step], "A parameter or a moment"
        if bad:
            self.checkpoints.wait()
            good = self.checkpoints.latest_step()
            kept = f"The last good checkpoint is step {good}" if good is not None else "There is no checkpoint yet"
            raise NonFinite(
                f"{what} is not finite at step {bad[0]}. {kept} in {self.checkpoints.folder}; nothing after it was "
                "saved. A lower learning rate, a longer warm-up or float32 compute usually helps."
            )

    def _validate(self, step: int, state: TrainState) -> dict[str, float]:
        windows = min(self.config.eval.windows, len(self.data.validation))
        row = _scores(self._perplexity(state, windows))
        self.tracker.row(step, "validation", row)
        self.tracker.say(f"Step {step}: " + _describe(row))
        return {"validation/nelbo": row.get("two_pass/nelbo", row["one_pass/nelbo"])}

    def _perplexity(self, state: TrainState, windows: int) -> dict[str, Nats]:
        config = self.config
        batches = data.validation_batches(
            self.data.validation, global_batch_size=config.eval.batch_size, max_windows=windows,
            host_index=jax.process_index(), host_count=jax.process_count(),
        )  # fmt: skip
        return self.perplexity(state.eval_params(), batches, len(self.data.validation), config.eval.seed)

    def _sample(self, step: int, state: TrainState) -> list[str]:
        sample = self.config.sample
        keys = row_keys(stream_key(jax.random.key(sample.seed), Stream.SAMPLE, step), np.arange(sample.count))
        shape = (sample.count, sample.length or self.config.data.seq_len)
        masks = np.full(shape, self.denoiser.mask_token_id, np.int32)
        tokens = np.asarray(self.sample_fn(state.eval_params(), keys, masks).tokens)
        texts = [self.tokenizer.decode(row) for row in tokens]
        self.tracker.row(step, "samples", {"texts": texts})
        for i, text in enumerate(texts):
            self.tracker.text(step, f"sample/{i}", text)
        return texts

    def _finish(self, state: TrainState) -> dict:
        config, step = self.config, int(state.step)
        self.tracker.end_progress()
        windows = min(config.eval.max_windows or len(self.data.validation), len(self.data.validation))
        print(f"Validating on {windows * config.data.seq_len:,} tokens and sampling ...")
        row = _scores(self._perplexity(state, windows))
        self.tracker.row(step, "final", row)
        texts = self._sample(step, state) if config.sample.count else []
        summary = {"finished": True, "step": step, "validation": row, "samples": texts}
        write_json(self.folder.path / "summary.json", summary)
        return summary

    def _say_what_starts(self, start: int) -> None:
        config, device = self.config, jax.devices()[0]
        if jax.process_index() == 0:
            print(
                f"{self.denoiser.num_params:,} parameters on {jax.device_count()} x {device.device_kind} "
                f"(mesh {dict(self.mesh.shape)}); {len(self.data.train):,} training and "
                f"{len(self.data.validation):,} validation windows of {config.data.seq_len} tokens."
            )
            print(f"Continuing from step {start}." if start else f"Training {config.train.steps} steps.")

    def _profile_step(self, step: int) -> None:
        """With --profile, a trace of a few steps after compilation, in <workdir>/profile."""
        if self.profile and step == PROFILED_STEPS.start:
            jax.profiler.start_trace(str(self.folder.path / "profile"))
        if self.profile and step == PROFILED_STEPS.stop:
            jax.profiler.stop_trace()
            self.tracker.say(f"Trace written to {self.folder.path / 'profile'}.")

    def _stop(self, number, _frame) -> None:
        if self.stopping and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.stopping = True


def _trees(state: TrainState) -> dict:
    return {"params": state.params, "ema": state.ema, "optimizer": state.opt_state}


def _scores(found: dict[str, Nats]) -> dict[str, float]:
    """A flat row of metrics: nats per token, perplexity, 95 % interval, for one pass and two."""
    row = {}
    for name, nats in found.items():
        low, high = nats.interval()
        row |= {
            f"{name}/nelbo": nats.mean, f"{name}/perplexity": nats.perplexity,
            f"{name}/nelbo_low": low, f"{name}/nelbo_high": high,
        }  # fmt: skip
    if "two_pass" in found:
        low, high = found["two_pass"].interval(found["one_pass"])
        row |= {"gain/low": -high, "gain/high": -low, "gain/nelbo": found["one_pass"].mean - found["two_pass"].mean}
    return row


def _describe(row: dict[str, float]) -> str:
    parts = [f"one pass {row['one_pass/perplexity']:.2f}"]
    if "two_pass/perplexity" in row:
        parts.append(f"two passes with soft-masking {row['two_pass/perplexity']:.2f}")
    return "validation perplexity: " + ", ".join(parts) + "."
