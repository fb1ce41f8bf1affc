"""The one train loop: mesh, model and objective come from the config; a killed run continues bit-exactly."""
import dataclasses
import functools
import os
from pathlib import Path

import jax
import numpy as np

from softmask_jax import data
from softmask_jax.config import Config, begun
from softmask_jax.config.jax_settings import root_key, settled
from softmask_jax.convert import converted
from softmask_jax.distributed import hosts, sharding
from softmask_jax.distributed.heartbeat import Heartbeat
from softmask_jax.distributed.preemption import StopSignal
from softmask_jax.io import checkpoint
from softmask_jax.io.files import plain, write_json
from softmask_jax.io.run_folder import NAMES, RunFolder
from softmask_jax.report import run_page
from softmask_jax.training import optimizer, tasks, train_state, wandb_rows
from softmask_jax.training.tracking import Clock, Openness, Profiler, Tracker, peak_flops, scalars, summarise
from softmask_jax.training.train_state import TrainState
from softmask_jax.training.update_flops import budgeted


class NonFinite(RuntimeError):
    """A loss, gradient or parameter stopped being finite; nothing of it was saved."""


@settled()
def train(config: Config, workdir: str, *, profile: bool = False, member: hosts.Member | None = None) -> dict:
    """Train, or continue, the run in `workdir`.

    Args:
      member: this process among several; None: from the environment.

    Returns:
      The summary, as in summary.json; {"finished": False, "step": n} where SIGTERM or Ctrl-C ended it.

    Raises:
      ValueError, FileNotFoundError, OSError: config, data, mesh or checkpoint don't fit; the message says what to do.
      RuntimeError: the hosts of a run do not come together, or do not run the same.
      NonFinite: names the step and the last good checkpoint.
      KeyboardInterrupt: SIGTERM or Ctrl-C before the first step or after the last, when everything is saved.
    """
    hosts.start(member or hosts.detect(), config.to_dict(), workdir)
    with StopSignal() as stop, RunFolder(workdir, names=NAMES) as folder:
        config = begun(config, folder.read_config())
        folder.check_config(config.to_dict())
        if (done := folder.read_summary()) and done["step"] >= config.updates:
            if folder.is_writer:
                how = "Another --workdir, or more config.train.steps, trains again."
                print(f"This run is done ({done['step']} steps). {how}\n")
            return done
        trainer = Trainer(config, folder, stop, profile)
        try:
            return trainer.run()
        finally:
            trainer.close()


class Trainer:
    """One process's part in a run. `__init__` builds what doesn't change, `run` restores, loops and finishes."""

    def __init__(self, config: Config, folder: RunFolder, stop: StopSignal, profile: bool):
        self.config, self.folder, self.stop = config, folder, stop
        if config.train.wandb:  # on all hosts, though the first one logs: if it ended alone the others would wait
            wandb_rows.package(config.train.wandb)
        if config.train.compilation_cache:
            jax.config.update("jax_compilation_cache_dir", os.path.expanduser(config.train.compilation_cache))
        self.mesh = sharding.make_mesh(**dataclasses.asdict(config.mesh))
        micro = config.train.global_batch_size // config.train.micro_batches
        sharding.check_batch("A micro-batch (config.train.global_batch_size / micro_batches)", micro, self.mesh)
        self.task = tasks.make(config, self.mesh)
        hosts.check_same("the text (files, split or tokenizer)", self.task.info["fingerprint"])
        self.denoiser, self.tokenizer = self.task.denoiser, self.task.tokenizer
        self.config = config = budgeted(config, self.denoiser)
        self.tx = optimizer.make(config.optimizer, config.updates)
        self.step = jax.jit(self.task.make_step(self.tx).train_step, donate_argnums=0)
        self.scalars = jax.jit(functools.partial(scalars, config))
        self.root_key = root_key(config.train.seed)
        self.peak = peak_flops(jax.devices()[0]) * jax.device_count()
        self.checkpoints = checkpoint.Checkpoints(
            folder.path / "checkpoints", keep=config.checkpoint.keep, keep_best=config.checkpoint.keep_best
        )
        self.profiler = Profiler(folder.path / "profile", profile)
        self.tracker, self.openness, self.heart = None, Openness(), Heartbeat()
        self.owed = []  # rows of the step continued from that a stop left out

    def run(self) -> dict:
        config, folder = self.config, self.folder
        state, start = self._restore_or_initialise()
        folder.write_config(config.to_dict())
        folder.write_versions()
        if folder.is_writer:
            self.task.save_tokenizer(folder.path / "tokenizer")
        # What `_finish` writes comes after the last checkpoint: a run killed there writes it again.
        again = ("final", "samples") if start >= config.updates else ()
        folder.truncate_metrics(start, again=(*again, *self.owed))
        self._say_what_starts(start)
        self.tracker = Tracker(folder, config, start=start)
        with self.stop.postponed():
            for kind in self.owed:
                self._midway(kind, start, state)
            state, stopped = self._loop(state, start)
            self.heart.beat(int(state.step), "saving")
            self.checkpoints.wait()
            stopped = stopped or self.stop.noted
        self.tracker.end_progress()
        if stopped:
            step, self.tracker.exit_code = int(state.step), wandb_rows.STOPPED
            if folder.is_writer:
                print(f"Stopped and saved at step {step}; the same command continues from there.", flush=True)
            return {"finished": False, "step": step}
        summary = self._finish(state)
        self.tracker.exit_code = wandb_rows.FINISHED
        return summary

    def close(self) -> None:
        self.profiler.stop()
        if self.tracker is not None:
            self.tracker.close()
        self.checkpoints.close()
        self.heart.close()

    def _loop(self, state: TrainState, start: int) -> tuple[TrainState, bool]:
        """Steps until the last one or a signal; whether it was a signal. Whatever interrupts them closes a row of
        metrics first, so that a run continued from any checkpoint of the schedule writes the same rows."""
        config, clock, pending, stopping = self.config, Clock(), [], False
        with self.task.batches(start) as batches:
            for step in range(start + 1, config.updates + 1):
                if self.profiler.before(step - start):
                    clock.restart(step - 1)
                state, metrics = self.step(state, sharding.global_batch(next(batches), self.mesh), self.root_key)
                pending.append(metrics)
                if step == start + 1:  # compilation is not part of the speed
                    jax.block_until_ready(metrics)
                    clock.restart(step)
                elif len(pending) > 2:  # the device stays busy, and the loop does not run away from it
                    pending[-3].loss.block_until_ready()
                self.tracker.progress(step)
                self.heart.beat(step)
                stopping, ends = self.stop.at(step), step == config.updates
                intervals = (config.train.log_every, config.eval.every, config.sample.every, config.checkpoint.every)
                logs, validates, samples, saves = (every > 0 and step % every == 0 for every in intervals)
                if not (logs or validates or samples or saves or stopping or ends):
                    continue
                self._log(step, state, pending, clock)
                # The last checkpoint is scored too; the last samples come with the final validation. A signal's grace
                # may be short: save first, the next start makes up for the rest.
                due = {"validation": validates or (ends and config.eval.every > 0), "samples": samples and not ends}
                found, owed = {}, []
                for kind in (kind for kind, is_due in due.items() if is_due):
                    if stopping := stopping or self.stop.noted:
                        owed.append(kind)
                    else:
                        found |= self._midway(kind, step, state)
                if saves or stopping or ends:
                    self._save(step, state, found, owed)
                if stopping:
                    break
                pending = []
                clock.restart(step)
        return state, stopping

    def _midway(self, kind: str, step: int, state: TrainState) -> dict[str, float]:
        """A row of validation or samples; the scores that rank the step's checkpoint."""
        self.heart.beat(step, kind)
        if kind == "validation":
            return self._validate(step, state)
        self._sample(step, state)
        return {}

    def _restore_or_initialise(self) -> tuple[TrainState, int]:
        abstract = train_state.abstract(self.denoiser, self.tx, self.mesh)
        found = self.checkpoints.restore_latest(_trees(abstract))
        if found is not None:
            step, trees, cursor = found
            if cursor["data"] != self.task.info["fingerprint"]:
                raise ValueError(
                    f"The run in {self.folder.path} was trained on other text (files, split, tokenizer, lengths or the "
                    "base have changed since, or another Python's stdlib): bring that text back, or use another "
                    "--workdir."
                )
            self.owed = cursor.get("owed", [])
            count = jax.device_put(np.int32(step), abstract.step.sharding)
            base = self.task.load_base(abstract.frozen) if abstract.frozen else {}
            return TrainState(count, trees["params"], trees["ema"], trees["optimizer"], base), step
        base = self.task.load_base(abstract.frozen or abstract.params["backbone"])
        state = train_state.initialise(self.denoiser, self.tx, self.mesh, self.config.train.seed, base)
        return (self._start_from(state, abstract) if self.config.init.checkpoint else state), 0

    def _start_from(self, state: TrainState, abstract: TrainState) -> TrainState:
        """Weights of another run, or of a converted model; its soft-masking scalars too, if it had learned some. The
        EMA starts from them."""
        source = Path(os.path.expanduser(self.config.init.checkpoint))
        if converted.is_converted(source):
            params = state.params | converted.start(source, self.tokenizer, abstract.params)
            return state._replace(params=params, ema=jax.tree.map(lambda x: x.copy(), params["backbone"]))
        with RunFolder(source, lock=False) as folder:
            other = folder.read_config()
        if other is None:
            raise FileNotFoundError(f"config.init.checkpoint: no run in {source} (it has no config.json).")
        if data.load_tokenizer(source / "tokenizer").fingerprint() != self.tokenizer.fingerprint():
            raise ValueError(
                f"config.init.checkpoint: {source} was trained with another tokenizer, so its weights mean other "
                f"tokens; give --config.data.tokenizer={source / 'tokenizer'}."
            )
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
        pending, now = jax.device_get((pending, self.scalars(state.step, state.params["soft_mask"])))
        bad = [number for number, m in enumerate(pending, step - len(pending) + 1) if not m.finite]
        if bad:
            raise self._non_finite("The loss or its gradient", bad[0])
        config, row = self.config, summarise(pending) | {name: float(value) for name, value in now.items()}
        if speed := clock.steps_per_second(step) * config.train.global_batch_size * self.task.row_length:
            forwards = self.task.forwards_per_step + row["two_pass_share"]
            flops = speed * forwards * self.denoiser.flops_per_token(self.task.row_length)
            row |= {"tokens_per_second": speed, "model_flops_per_second": flops, "model_flops_share": flops / self.peak}
            self.tracker.speed(row["loss"], speed)
        self.tracker.row(step, "train", row)
        if "lambda_mean" in row and (line := self.openness.line(step, row["lambda_mean"], row["soft_mask/scale"])):
            self.tracker.say(line)

    def _save(self, step: int, state: TrainState, found: dict[str, float], owed: list[str]) -> None:
        self.heart.beat(step, "saving")
        if not bool(train_state.all_finite(_trees(state))):
            raise self._non_finite("A parameter or a moment", step)
        cursor = {"step": step, "data": self.task.info["fingerprint"], "owed": owed}
        self.checkpoints.save(step, _trees(state), cursor, found)

    def _non_finite(self, what: str, step: int) -> NonFinite:
        self.checkpoints.wait()
        good = self.checkpoints.latest_step()
        kept = f"The last good checkpoint is step {good}" if good is not None else "There is no checkpoint yet"
        return NonFinite(
            f"{what} is not finite at step {step}. {kept} in {self.checkpoints.folder}; nothing after it was saved. "
            "A lower learning rate, a longer warm-up or float32 compute usually helps."
        )

    def _validate(self, step: int, state: TrainState) -> dict[str, float]:
        row = self.task.validate(state, final=False)
        self.tracker.row(step, "validation", row)
        self.tracker.say(f"Step {step}: {self.task.describe(row)}.")
        return self.task.rank(row)

    def _sample(self, step: int, state: TrainState) -> list[str]:
        texts = self.task.sample(state, step)
        self.tracker.row(step, "samples", {"texts": texts})
        return texts

    def _finish(self, state: TrainState) -> dict:
        config, step = self.config, int(state.step)
        self.heart.beat(step, "ending")
        if self.folder.is_writer:
            print("Validating and sampling ...", flush=True)
        row = self.task.validate(state, final=True)
        self.tracker.row(step, "final", row)
        texts = self._sample(step, state) if config.sample.count else []
        summary = {"finished": True, "step": step, "validation": row, "samples": texts, "data": plain(self.task.info)}
        if self.folder.is_writer:
            run_page.write_at_end(self.folder.path, summary)
            # The last of all: a run without it repeats its end.
            write_json(self.folder.path / "summary.json", summary)
        return summary

    def _say_what_starts(self, start: int) -> None:
        config, device = self.config, jax.devices()[0]
        if self.folder.is_writer:
            print(
                f"{self.denoiser.num_params:,} parameters on {jax.device_count()} x {device.device_kind} "
                f"(mesh {dict(self.mesh.shape)}); {self.task.describe_data()}.",
                flush=True,
            )
            print(f"Continuing from step {start}." if start else f"Training {config.updates} steps.", flush=True)


def _trees(state: TrainState) -> dict:
    return {"params": state.params, "ema": state.ema, "optimizer": state.opt_state}
