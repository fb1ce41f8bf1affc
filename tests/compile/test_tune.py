"""The search for the fastest settings: with made-up programs, and a small model with the TPU compiler."""
import jax
import pytest

from softmask_jax import config as schema
from softmask_jax.compile import choices, programs, reading, scaling, tune, tuned
from softmask_jax.compile.__main__ import main
from softmask_jax.compile.report import GIB, roofline
from softmask_jax.compile.topology import Topology

SLICE = Topology("v5e:2x4")
DREAM = "configs/dream7b.py"


class Programs:
    """Stands for `sweep.Units`: memory and work of a 7B adapter, in closed form; `broken` remats do not compile.
    state: GiB of a base."""

    def __init__(self, broken=(), state=14.0):
        self.broken, self.state, self.read = broken, state, []

    def measure(self, unit, micro):
        self.read.append(unit)
        if unit.remat in self.broken:
            raise RuntimeError("INTERNAL: no such loop")
        again = {"none": 0.0, "attention": 0.02, "products": 0.05, "dots": 0.1, "mlp": 0.12, "full": 0.33}[unit.remat]
        stored = {"none": 12.0, "attention": 11.0, "products": 10.0, "dots": 6.0, "mlp": 4.0, "full": 0.5}[unit.remat]
        state = self.state / (2 if unit.base_dtype == "int8" else 1)
        kept = state / unit.fsdp / unit.tensor
        peak = kept + unit.rows * stored / unit.tensor / unit.sequence + 0.5
        work, sent = 93e12 * unit.rows / unit.tensor / unit.sequence, (1 - 1 / unit.fsdp) * 3 * state * 1e9
        sent += 8e9 * unit.rows * (unit.tensor > 1) + 4e9 * (unit.sequence > 1)
        mesh = {"dcn_data": 1, "data": unit.data, "fsdp": unit.fsdp, "sequence": unit.sequence, "tensor": unit.tensor}
        return reading.Reading(
            topology="v5e:2x2", kind="train", description="", mesh=mesh, rows=unit.rows * unit.data * unit.fsdp * micro,
            length=2048, micro=micro, tokens=unit.rows * unit.data * unit.fsdp * micro * 2048,
            kept={"base": kept * GIB, "params": 0.0}, memory={"arguments": round(peak * GIB)}, needed=0, free=0,
            flops=work * (1 + again) * micro, model_flops=work * micro, hbm=50e9 * micro, wire={"all-gather": sent * micro},
        )  # fmt: skip


@pytest.fixture
def on_cpus(monkeypatch):
    monkeypatch.setattr(Topology, "devices", lambda self: jax.devices()[:self.chips])


def searched(units, batch=16, **options):
    config = schema.load(DREAM)
    tuner = tune.Tuner(config, units=units, **options)
    return tuner, tuner.tune(SLICE, batch)


def test_the_search_finds_the_best_of_all_programs_and_tries_few(on_cpus):
    units = Programs()
    tuner, best = searched(units)
    space = choices.Space(tuner.config, SLICE, 16)
    every = [
        choices.Choice(8, 16, *mesh, remat, rows, base) for mesh in space.meshes for base in space.base_dtypes
        for remat in choices.REMAT for rows in (1, 2, 4, 8, 16)
    ]  # fmt: skip
    every = [choice for choice in every if choice.each % choice.rows == 0]
    exhaustive = tune.Tuner(tuner.config, units=Programs())
    top = max((exhaustive.read(SLICE, choice) for choice in every), key=lambda t: t.score)
    assert best.score[1] >= 0.97 * top.score[1] and best.score[0] == 1
    assert len(units.read) < len(every) / 5
    assert best == tuner.ranking(SLICE)[0] and tuner.ranking(SLICE) == sorted(
        tuner.ranking(SLICE), key=lambda t: t.score, reverse=True)


def test_what_does_not_fit_is_never_the_best_and_fewer_rows_are_tried(on_cpus):
    tuner, best = searched(Programs(state=60.0), batch=64)
    assert best.reading.fits and best.choice.fsdp > 1
    assert all(not tried.reading.fits for tried in tuner.ranking(SLICE) if tried.reading.peak > SLICE.memory)


def test_where_nothing_fits_the_smallest_comes_first_and_no_config_is_written(on_cpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tune, "Units", lambda config, **options: Programs(state=1000.0))
    out = tmp_path / "tuned.py"
    assert main([f"--config={DREAM}", f"--topology={SLICE.name}", "--tune", "--batches=16", f"--out={out}"]) == 3
    assert "nothing fits" in capsys.readouterr().out and not out.exists()


def test_programs_that_the_compiler_fails_on_are_passed_over(on_cpus):
    lines = []
    tuner, best = searched(Programs(broken=("mlp",)), say=lines.append)
    assert best.choice.remat == "dots" and any("INTERNAL" in line for line in lines)
    assert all(t.problem for t in tuner.ranking(SLICE) if t.choice.remat == "mlp")


def test_a_batch_is_not_changed_and_one_that_no_mesh_divides_is_refused(on_cpus, monkeypatch):
    tuner, best = searched(Programs(), batch=4)
    assert {tried.choice.batch for tried in tuner.ranking(SLICE)} == {4} and best.choice.group >= 2
    assert best.reading.rows == 4

    def one_chip_a_host(mesh):
        if mesh.shape["sequence"] * mesh.shape["tensor"] > 1:
            raise ValueError("hosts")

    monkeypatch.setattr(choices.sharding, "check_hosts", one_chip_a_host)
    with pytest.raises(ValueError, match="No mesh of 8 chips shares 4 rows evenly; give --batches=8"):
        choices.Space(tuner.config, SLICE, 4)


def test_a_slice_with_more_chips_than_rows_also_tries_a_row_a_chip():
    config = schema.load(DREAM)
    assert choices.batches(config, Topology("v5e:4x4")) == [8, 16] and choices.batches(config, Topology("v5e:1x1")) == [8]


def test_the_written_config_makes_the_searchs_choice(on_cpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tune, "Units", lambda config, **options: Programs())
    out = tmp_path / "tuned.py"
    words = [f"--config={DREAM}:binary", f"--topology={SLICE.name}", "--tune", f"--out={out}", "--config.train.seed=7"]
    assert main(words) == 0
    said, config = capsys.readouterr().out, schema.load(str(out))
    assert config.train.seed == 7 and config.soft_mask.variant == "none" and config.model.base_dtype == "float"
    pasted = next(line.split() for line in said.splitlines() if line.strip().startswith("--config="))
    same = schema.load(pasted[0].partition("=")[2], [word.removeprefix("--config.") for word in pasted[1:]] + ["train.seed=7"])
    assert config == same and "int8 base" in said


def test_the_file_on_scaling_has_the_best_of_every_slice(on_cpus, monkeypatch):
    monkeypatch.setattr(tune, "Units", lambda config, **options: Programs())
    text = scaling.document(["v5e"], [1, 4, 8], models=[("Dream", DREAM, "8 rows")])
    tables = text.removesuffix(scaling.NOTES.read_text("utf-8"))
    assert all(tables.count(f"| v5e:{shape} |") == 3 for shape in ("1x1", "2x2", "2x4")) and "remat=" in tables
    assert "Nothing here was run on a TPU" in text and "What breaks first beyond 256 chips" in text


@pytest.mark.soak
def test_a_small_model_is_tuned_with_the_compiler_and_ranked_by_its_programs(tmp_path, capsys):
    topology, options = Topology("v5e:2x2"), {"vocab_size": 258, "cache": tmp_path}
    words = ["model.hidden_size=128", "data.seq_len=64", "train.global_batch_size=4"]
    config = schema.load("configs/stdlib.py:smoke", words)
    tuner = tune.Tuner(config, **options)
    best = tuner.tune(topology, 4)
    ranking = [tried for tried in tuner.ranking(topology) if tried.reading]
    for tried in ranking[:2]:
        changed = [f"{name}={value}" for name, value in tuned.changes(config, tried.choice).items()]
        own = schema.load("configs/stdlib.py:smoke", [*words, *changed])
        program = programs.training(own, topology.devices(), vocab_size=258)
        direct = reading.read(program, topology, own.model, cache=tmp_path)
        assert direct.mesh == tried.reading.mesh and direct.micro == tried.reading.micro
        assert roofline(direct).tokens_per_s == pytest.approx(roofline(tried.reading).tokens_per_s, rel=0.1)
    out = tmp_path / "tuned.py"
    out.write_text(tuned.config_file("configs/stdlib.py:smoke", str(out), words, topology, config, best), "utf-8")
    assert schema.load(str(out)).train.micro_batches == best.choice.micro
    from softmask_jax.main import main as train

    assert train([f"--config={out}", f"--workdir={tmp_path / 'run'}", "--config.mesh.tensor=64"]) == 1
    assert "config.mesh (" in capsys.readouterr().err  # read, and refused for this machine's devices alone
