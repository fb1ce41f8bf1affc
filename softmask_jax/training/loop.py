"""The train loop: mesh, model and objective come from the config; a killed run continues bit-exactly."""
import contextlib
import dataclasses
import functools
from pathlib import Path

import jax
import numpy as np

from softmask_jax import data
from softmask_jax.config import Config, begun
from softmask_jax.config.jax_settings import root_key, settled
from softmask_jax.convert import bases, converted
from softmask_jax.diffusion.soft_masking import RAW_NAMES
from softmask_jax.distributed import hosts, sharding
from softmask_jax.distributed.heartbeat import Heartbeat
from softmask_jax.distributed.preemption import StopSignal
from softmask_jax.io import checkpoint
from softmask_jax.io.files import plain, write_json
from softmask_jax.io.paths import to_path
from softmask_jax.io.run_folder import NAMES, RunFolder
from softmask_jax.report import run_page
from softmask_jax.training import optimizer, profiling, tasks, train_state, train_step, trajectory, wandb_rows
from softmask_jax.training.startup import Stopwatch, keep_compiled_programs
from softmask_jax.training.tracking import (
    Clock, Openness, Tracker, in_words, peak_flops, scalars, state_in_words, summarise,
)  # fmt: skip
from softmask_jax.training.train_state import TrainState
from softmask_jax.training.update_flops import budgeted, forward_flops
from softmask_jax.training.wall_time import WallTime


class NonFinite(RuntimeError):
    """A loss, gradient or parameter is not finite; it was not saved."""


@settled()
def train(config: Config, workdir: str, *, profile: range | bool = False, profiler_port: int | None = None,
          fetch: bool = False, member: hosts.Member | None = None, begun_at: float | None = None) -> dict:
    """Train, or continue, the run in `workdir`; member: this process among several, by default from the environment.
    profile: steps to trace, see `Profiler`. profiler_port: of a server for XProf.
    fetch: whether to download and convert a base that is not there.
    begun_at: `time.perf_counter()` at the start of the command, for the seconds to the first step.

    Returns the summary, as in summary.json, or {"finished": False, "step": n} if SIGTERM or Ctrl-C ended the loop.
    KeyboardInterrupt: SIGTERM or Ctrl-C before the first or after the last step. NonFinite names the step and the last
    good checkpoint. ValueError, OSError: config, data, mesh, checkpoint, trace or port do not fit. RuntimeError: the
    hosts do not come together, or run different things."""
    watch = Stopwatch(begun_at)
    hosts.start(member or hosts.detect(), config.to_dict(), workdir)
    with StopSignal() as stop, RunFolder(workdir, names=NAMES) as folder:
        config = begun(config, folder.read_config())
        folder.check_config(config.to_dict())
        if config.counted and (done := folder.read_summary()) and done["step"] >= config.updates:
            if folder.is_writer:
                how = "More config.train.steps (or epochs) trains on; other data need another --workdir."
                print(f"This run is done ({done['step']} steps). {how}\n")
            return done
        with WallTime(folder, watch.begun_unix) as times, profiling.server(profiler_port):
            bases.ensure(config.model, fetch=fetch, processes=jax.process_count())
            with contextlib.closing(Trainer(config, folder, stop, profile, watch, times)) as trainer:
                return trainer.run()


class Trainer:
    """One process's part in a run. `__init__` builds what doesn't change, `run` restores, loops and finishes."""

    def __init__(self, config: Config, folder: RunFolder, stop: StopSignal, profile: range | bool, watch: Stopwatch,
                 times: WallTime):  # fmt: skip
        self.folder, self.stop, self.watch, self.times = folder, stop, watch, times
        if config.train.wandb:  # checked on all hosts: the others would wait for one that fails alone
            wandb_rows.package(config.train.wandb)
        keep_compiled_programs(config)
        self.mesh = sharding.make_mesh(**dataclasses.asdict(config.mesh))
        micro = config.train.global_batch_size // config.train.micro_batches
        sharding.check_batch("A micro-batch (config.train.global_batch_size / micro_batches)", micro, self.mesh)
        self.task = tasks.make(config, self.mesh)
        hosts.check_same("the text (files, split or tokenizer)", self.task.info["fingerprint"])
        self.denoiser, self.tokenizer = self.task.denoiser, self.task.tokenizer
        self.config = config = budgeted(config, self.denoiser, self.task.steps_per_epoch)
        self.profiler = profiling.Profiler(folder.path / "profile", profile, config.updates)
        self.tx = optimizer.make(config.schedule, config.updates)
        self.step = jax.jit(train_step.make(config, self.denoiser, self.tx).train_step, donate_argnums=0)
        self.scalars = jax.jit(functools.partial(scalars, config))
        self.peak = peak_flops(jax.devices()[0]) * jax.device_count()
        self.forward_flops = forward_flops(self.denoiser, self.task.row_length)
        self.root_key, kept = root_key(config.train.seed), config.checkpoint
        self.checkpoints = checkpoint.Checkpoints(folder.path / "checkpoints", keep=kept.keep, keep_best=kept.keep_best)
        self.tracker, self.openness, self.heart = None, Openness(), Heartbeat()
        self.owed = []  # rows that a stop left out at the step of the restored checkpoint
        watch.lap("data and model")

    def run(self) -> dict:
        config, folder = self.config, self.folder
        state, start = self._restore_or_initialise()
        self.times.continue_from(start)
        self.watch.lap("weights")
        folder.write_config(config.to_dict())
        folder.write_versions()
        if folder.is_writer:
            self.task.save_tokenizer(folder.path / "tokenizer")
        # A run killed after its last checkpoint repeats `_finish`, one before its first the samples of step 0.
        repeated = () if 0 < start < config.updates else ("final", "samples")
        folder.truncate_metrics(start, again=(*repeated, *self.owed))
        mesh = f"{jax.device_count()} x {jax.devices()[0].device_kind} (mesh {dict(self.mesh.shape)})"
        self._print(f"{self.denoiser.num_params:,} parameters on {mesh}; {self.task.describe_data()}.")
        self._print(f"Continuing from step {start}." if start else f"Training {config.updates} steps.")
        self._print(self.profiler.begin(start))
        self.tracker = Tracker(folder, config, start=start)
        if start == 0 and self.task.samples_start and config.sample.count:
            self._midway("samples", start, state)
            self.watch.lap("samples")
        with self.stop.postponed():
            for kind in self.owed:
                self._midway(kind, start, state)
            state, stopped = self._loop(state, start)
            self.heart.beat(int(state.step), "saving")
            with self.times.on("saving"):
                self.checkpoints.wait()
            stopped = stopped or self.stop.noted
        self.times.enter("other")
        self.tracker.shown.close()
        if stopped:
            step, self.tracker.exit_code = int(state.step), wandb_rows.STOPPED
            self._print(f"Stopped and saved at step {step}; the same command continues from there.")
            return {"finished": False, "step": step}
        summary = self._finish(state)
        self.times.account.finished = True
        self.tracker.exit_code = wandb_rows.FINISHED
        return summary

    def close(self) -> None:
        self.profiler.stop()
        if self.tracker is not None:
            self.tracker.close()
        self.checkpoints.close()
        self.heart.close()

    def _loop(self, state: TrainState, start: int) -> tuple[TrainState, bool]:
        """(state, whether a signal ended the loop). Every interruption of the steps closes a row of metrics first: a
        run continued from any scheduled checkpoint writes the same rows."""
        config, clock, pending, stopping = self.config, Clock(), [], False
        tokens = config.train.global_batch_size * self.task.row_length
        with self.task.batches(start) as batches:
            for step in range(start + 1, config.updates + 1):
                if self.profiler.is_due(step):
                    with self.times.on("other"):
                        self.profiler.turn(pending)
                    clock.restart(step - 1)
                with self.times.waiting(pending):
                    batch = next(batches)
                is_first = step == start + 1
                with self.times.on("compiling" if is_first else "steps"), profiling.annotated(step):
                    state, metrics = self.step(state, sharding.global_batch(batch, self.mesh), self.root_key)
                pending.append(metrics)
                if is_first:  # compilation is not part of the speed
                    jax.block_until_ready(metrics)
                    self.watch.lap("compiling and running it")
                    self.tracker.say(self.watch.line())
                    clock.restart(step)
                elif len(pending) > 2:  # the device stays busy, and the loop does not run away from it
                    pending[-3].loss.block_until_ready()
                self.tracker.state = functools.partial(state_in_words, pending, step, clock, tokens, is_first)
                self.tracker.progress(step)
                self.heart.beat(step)
                stopping, ends = self.stop.at(step), step == config.updates
                intervals = (config.train.log_every, config.eval.every, config.sample.every, config.checkpoint.every)
                logs, validates, samples, saves = (every > 0 and step % every == 0 for every in intervals)
                if not (logs or validates or samples or saves or stopping or ends):
                    continue
                self._log(step, state, pending, clock)
                # The last step is scored; `_finish` samples. After a signal save first: a restart makes up for `owed`.
                due = {"validation": validates or (ends and config.eval.every > 0), "samples": samples and not ends}
                ranks, owed = {}, []
                for kind in (kind for kind, is_due in due.items() if is_due):
                    if stopping := stopping or self.stop.noted:
                        owed.append(kind)
                    else:
                        ranks |= self._midway(kind, step, state)
                if saves or stopping or ends:
                    self._save(step, state, ranks, owed)
                if stopping:
                    break
                pending = []
                clock.restart(step)
        return state, stopping

    def _midway(self, kind: str, step: int, state: TrainState) -> dict[str, float]:
        """Write a row of validation or samples; return the scores that rank the step's checkpoint."""
        self.heart.beat(step, kind)
        if kind == "validation":
            return self._validate(step, state)
        self._sample(step, state)
        return {}

    def _restore_or_initialise(self) -> tuple[TrainState, int]:
        abstract = train_state.abstract(self.denoiser, self.tx, self.mesh)
        latest = self.checkpoints.restore_latest(_trees(abstract))
        if latest is None:
            base = self.task.load_base(abstract.frozen or abstract.params["backbone"])
            state = train_state.initialise(self.denoiser, self.tx, self.mesh, self.config.train.seed, base)
            return (self._start_from(state, abstract) if self.config.init.checkpoint else state), 0
        step, trees, cursor = latest
        if cursor["data"] != self.task.info["fingerprint"]:
            causes = "files, split, tokenizer, lengths or the base have changed since, or another Python's stdlib"
            remedy = "bring that text back, or use another --workdir"
            raise ValueError(f"The run in {self.folder.path} was trained on other text ({causes}): {remedy}.")
        self.owed = cursor.get("owed", [])
        count = jax.device_put(np.int32(step), abstract.step.sharding)
        base = self.task.load_base(abstract.frozen) if abstract.frozen else {}
        return TrainState(count, trees["params"], trees["ema"], trees["optimizer"], base), step

    def _start_from(self, state: TrainState, abstract: TrainState) -> TrainState:
        """Weights of another run or a converted model, with trained soft-masking scalars; the EMA starts from them."""
        source = to_path(self.config.init.checkpoint)
        if converted.is_converted(source):
            params = state.params | converted.start(source, self.tokenizer, abstract.params)
        else:
            params = state.params | self._params_of_run(source, abstract)
        return state._replace(params=params, ema=jax.tree.map(lambda x: x.copy(), params["backbone"]))

    def _params_of_run(self, source: Path, abstract: TrainState) -> dict:
        with RunFolder(source, lock=False) as folder:
            other = folder.read_config()
        if other is None:
            raise FileNotFoundError(f"config.init.checkpoint: no run in {source} (it has no config.json).")
        if data.load_tokenizer(source / "tokenizer").fingerprint() != self.tokenizer.fingerprint():
            reason = f"{source} was trained with another tokenizer, so its weights mean other tokens"
            raise ValueError(f"config.init.checkpoint: {reason}; give --config.data.tokenizer={source / 'tokenizer'}.")
        binary, shapes = other["soft_mask"]["variant"] == "none", dict(abstract.params)
        if binary:  # its scalars are untrained, and it has no projection
            shapes["soft_mask"] = {name: shapes["soft_mask"][name] for name in RAW_NAMES}
        with checkpoint.Checkpoints(source / "checkpoints") as checkpoints:
            _, trees = checkpoints.restore_params(abstract={"params": shapes, "ema": abstract.ema})
        params = trees["params"] | ({"backbone": trees["ema"]} if self.config.init.weights == "ema" else {})
        if binary:
            del params["soft_mask"]
        return params

    def _log(self, step: int, state: TrainState, pending: list, clock: Clock) -> None:
        pending, now = jax.device_get((pending, self.scalars(state.step, state.params["soft_mask"])))
        bad = [number for number, m in enumerate(pending, step - len(pending) + 1) if not m.finite]
        if bad:
            raise self._non_finite("The loss or its gradient", bad[0])
        config, row = self.config, summarise(pending) | {name: float(value) for name, value in now.items()}
        if speed := clock.steps_per_second(step) * config.train.global_batch_size * self.task.row_length:
            forwards = self.task.forwards_per_step + row["two_pass_share"]
            flops = speed * forwards * self.forward_flops
            row |= {"tokens_per_second": speed, "model_flops_per_second": flops, "model_flops_share": flops / self.peak}
            self.tracker.shown.note = in_words(row["loss"], speed)
        self.tracker.row(step, "train", row)
        if "lambda_mean" in row and (line := self.openness.line(step, row["lambda_mean"], row["soft_mask/scale"])):
            self.tracker.say(line)

    def _save(self, step: int, state: TrainState, ranks: dict[str, float], owed: list[str]) -> None:
        self.heart.beat(step, "saving")
        with self.times.on("saving"):
            if not bool(train_state.all_finite(_trees(state))):
                raise self._non_finite("A parameter or a moment", step)
            cursor = {"step": step, "data": self.task.info["fingerprint"], "owed": owed}
            self.folder.flush()  # a continued run has the rows and the times up to its checkpoint
            self.times.checkpoint(step)
            self.checkpoints.save(step, _trees(state), cursor, ranks)

    def _non_finite(self, what: str, step: int) -> NonFinite:
        self.checkpoints.wait()
        good = self.checkpoints.latest_step()
        kept = f"The last good checkpoint is step {good}" if good is not None else "There is no checkpoint yet"
        state = f"{kept} in {self.checkpoints.folder}; nothing after it was saved"
        advice = "A lower learning rate, a longer warm-up or float32 compute usually helps."
        return NonFinite(f"{what} is not finite at step {step}. {state}. {advice}")

    def _validate(self, step: int, state: TrainState) -> dict[str, float]:
        with self.times.on("validating"):
            row = self.task.validate(state, final=False)
        self.tracker.row(step, "validation", row)
        self.tracker.say(f"Step {step}: {self.task.describe(row)}.")
        return self.task.rank(row)

    def _sample(self, step: int, state: TrainState) -> list[str]:
        with self.times.on("other"):
            row = self.task.sample(state, step)
        self.tracker.row(step, "samples", row)
        return row["texts"]

    def _finish(self, state: TrainState) -> dict:
        config, step = self.config, int(state.step)
        self.heart.beat(step, "ending")
        self._print("Validating and sampling ...")
        with self.times.on("validating"):
            row = self.task.validate(state, final=True)
        self.tracker.row(step, "final", row)
        texts = self._sample(step, state) if config.sample.count else []
        trajectory.write(self.folder, self.task, state)
        summary = {"finished": True, "step": step, "validation": row, "samples": texts, "data": plain(self.task.info)}
        self.times.record()
        summary["goodput"] = self.times.account.goodput
        if self.folder.is_writer:
            run_page.write_at_end(self.folder.path, summary)
            # Written last: a run without it repeats its end.
            write_json(self.folder.path / "summary.json", summary)
        return summary

    def _print(self, line: str) -> None:
        if line and self.folder.is_writer:
            print(line, flush=True)


def _trees(state: TrainState) -> dict:
    return {"params": state.params, "ema": state.ema, "optimizer": state.opt_state}
