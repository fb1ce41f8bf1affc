"""`softmask_jax.load(path)`: a trained model, from a run's folder or a converted model's."""
import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax

from softmask_jax import config as config_schema
from softmask_jax.config import Config
from softmask_jax.config.jax_settings import settled
from softmask_jax.convert import converted, outputs
from softmask_jax.convert.model import Model as Converted, adapted_kind, read_adapter
from softmask_jax.convert.orbax_files import stored_specs
from softmask_jax.convert.sources import ADAPTER_CONFIG, open_model
from softmask_jax.data import load_tokenizer, open_tokenizer
from softmask_jax.data.chat.template import TURN_ENDS, load_template
from softmask_jax.data.tokenizers.files import holds_tokenizer
from softmask_jax.diffusion import soft_masking
from softmask_jax.distributed import sharding
from softmask_jax.generate.model import Model
from softmask_jax.io.checkpoint import Checkpoints
from softmask_jax.io.paths import to_path
from softmask_jax.io.run_folder import RunFolder
from softmask_jax.io.runs import is_run
from softmask_jax.models import denoiser as denoisers, families
from softmask_jax.models.nn.dream_config import special_ids
from softmask_jax.samplers import SoftMask
from softmask_jax.training import train_state

ACCEPTED = (
    "give the --workdir of a training run, a folder that python -m softmask_jax.convert wrote, or, with the base that "
    "it was trained on, PEFT's folder of an adapter"
)


@settled()
def load(path: str | os.PathLike, *, weights: str = "ema", step: int | None = None, base: str = "",
         mesh: jax.sharding.Mesh | None = None) -> Model:  # fmt: skip
    """A trained model of any family.

    Args:
      path: folder of a run, of a converted model (float or int8) or adapter, or of PEFT's adapter.
      weights: "ema" (what is evaluated) or "raw", of a run.
      step: checkpoint of a run; the newest undamaged one by default.
      base: converted model with the frozen weights of an adapter or run; by default the one that the run names.
      mesh: layout of parameters and rows, see `sharding.make_mesh`; one device by default.

    FileNotFoundError: no model or checkpoint. ValueError: unknown `weights`, an adapter without base, other parameters.
    """
    if weights not in ("ema", "raw"):
        raise ValueError(f"weights is '{weights}'; choose ema or raw.")
    path = to_path(path)
    peft = open_model(path) if (path / ADAPTER_CONFIG).is_file() else None
    if peft is not None:
        manifest = peft.manifest
    else:
        manifest = converted.read_ours(path) if converted.is_converted(path) else None
    if manifest is None and not is_run(path):
        lacking = "checkpoints" if (path / "config.json").is_file() else "config.json"
        raise FileNotFoundError(f"No model in '{path}' (it has no {lacking}); {ACCEPTED}.")
    config = _config(path, manifest, base)
    family = families.of(config.model.kind)
    fields = (_on_base if family.kind.from_base else _own_sizes)(path, manifest, config, mesh)
    denoiser = fields["denoiser"]
    shapes = denoisers.abstract(denoiser, mesh)
    trained, frozen = train_state.split(shapes, denoiser.frozen)
    if frozen:
        frozen = converted.read_base_params(to_path(config.model.base), {"backbone": frozen})[0]["backbone"]
    if manifest is None:
        step, params = _checkpoint(path, trained, weights, step)
    elif not family.kind.from_base:
        step, params = manifest.get("step", 0), converted.read_params(path, shapes)
    else:
        with contextlib.nullcontext(path) if peft is None else _in_our_format(peft) as folder:
            params = _of_converted(folder, manifest["kind"], trained["backbone"])
        step = manifest.get("step") or 0
    params["backbone"] = frozen | params["backbone"]
    return Model(config, params=params, step=step, row_shards=sharding.batch_shards(mesh), **fields)


def _config(path: Path, manifest: Mapping | None, base: str) -> Config:
    """Config of a run or converted MDLM, or what is known of a converted Dream or adapter; model.base: frozen part."""
    if manifest is None:
        with RunFolder(path, lock=False) as folder:
            config = config_schema.of_run(folder.read_config())
        base = base or config.model.base
        model = dataclasses.replace(config.model, base=str(to_path(base)) if base else "")
        return dataclasses.replace(config, model=model)
    if "config" in manifest:
        return config_schema.of_run(manifest["config"])
    adapter = {}
    if manifest["kind"] == "adapter":
        if not base:
            advice = "give the converted model that it was trained on: load(path, base=...)"
            raise ValueError(f"{path} is an adapter; {advice}.")
        peft = read_adapter(manifest)
        adapter = {
            "adapter": "dora" if peft.use_dora else "lora", "adapter_rank": peft.rank,
            "adapter_alpha": float(peft.scaling * peft.rank), "adapter_targets": f"^({'|'.join(peft.targets)})$",
        }  # fmt: skip
    base = to_path(base) if adapter else path
    kind = converted.read_ours(base)["kind"]
    if adapter and kind != (wanted := adapted_kind(manifest)):
        raise ValueError(f"{path} is an adapter for a model of kind {wanted}; {base} is {kind}.")
    dtype = stored_specs(base / "params")["backbone/final_norm/scale"].dtype.name
    soft_mask = manifest["soft_mask"] or {"variant": "none", "k": 1}
    model = config_schema.Model(kind=kind, base=str(base), param_dtype=dtype, **adapter)
    return Config(model, config_schema.SoftMask(soft_mask["variant"], soft_mask["k"]))


def _own_sizes(path: Path, manifest: Mapping | None, config: Config, mesh) -> dict:
    """Fields of a `Model` whose sizes are in the config."""
    tokenizer = load_tokenizer(path / "tokenizer") if manifest is None else converted.read_tokenizer(path)
    sizes = {"vocab_size": tokenizer.vocab_size, "mask_token_id": tokenizer.mask_token_id}
    denoiser = families.of(config.model.kind).build(config.model, config.soft_mask, sizes, mesh=mesh)
    return {"tokenizer": tokenizer, "denoiser": denoiser}


def _on_base(path: Path, manifest: Mapping | None, config: Config, mesh) -> dict:
    """Fields of a `Model` whose sizes are in config.json of a converted model."""
    base = to_path(config.model.base)
    about = converted.read_ours(base)
    hf_config = about["hf_config"]
    # Kernels of the base may be int8, whatever a run trained on.
    dtypes = {"compute_dtype": config.model.param_dtype, "base_dtype": about.get("base_dtype", "float")}
    network = dataclasses.replace(config.model, **dtypes)
    family = families.of(network.kind)
    denoiser = family.build(network, config.soft_mask, about, mesh=mesh)
    folder, tokenizer, template = (path if manifest is None else base) / "tokenizer", None, None
    if holds_tokenizer(folder):
        tokenizer, template = open_tokenizer(folder).with_mask(denoiser.mask_token_id), load_template(folder)
        if denoiser.used_vocab is not None:
            denoiser = dataclasses.replace(denoiser, used_vocab=min(denoiser.used_vocab, tokenizer.vocab_size))
    _, ends, pad = special_ids(hf_config)
    if pad is None:
        raise ValueError("config.json has neither pad_token_id nor eos_token_id; one of them must be set.")
    # Answers of a chat end with the template's token; padding follows.
    turns = () if tokenizer is None else (tokenizer.special_tokens.get(name) for name in TURN_ENDS)
    soft_mask = manifest and manifest["soft_mask"]
    return {
        "tokenizer": tokenizer, "template": template, "denoiser": denoiser, "pad_token_id": pad,
        "soft_mask": SoftMask(**soft_mask) if soft_mask else None,
        "end_token_ids": tuple(dict.fromkeys(token for token in (*ends, pad, *turns) if token is not None)),
        "max_length": int(hf_config.get(family.published.max_length) or 2048),
    }  # fmt: skip


def _checkpoint(path: Path, shapes: dict, weights: str, step: int | None) -> tuple[int, dict]:
    """Step and parameters of a run's checkpoint, cast from float32."""
    trees = {"params": shapes} | ({"ema": shapes["backbone"]} if weights == "ema" else {})
    with Checkpoints(path / "checkpoints") as checkpoints:
        step, restored = checkpoints.restore_params(step, items=tuple(trees), abstract=trees, narrow=True)
    return step, restored["params"] | ({"backbone": restored["ema"]} if weights == "ema" else {})


@contextlib.contextmanager
def _in_our_format(adapter: Converted) -> Iterator[Path]:
    """Temporary folder of PEFT's adapter, converted."""
    with tempfile.TemporaryDirectory() as folder:
        outputs.write(Path(folder), adapter, "orbax", source="", tokenizer=None, progress=lambda _: None)
        yield Path(folder)


def _of_converted(path: Path, kind: str, trained: dict) -> dict:
    """Parameters of a converted Dream, or of an adapter on one."""
    adapter = kind == "adapter"
    trees, scalars = converted.read_base_params(path, trained if adapter else {"backbone": trained})
    return {"backbone": trees if adapter else trees["backbone"], "soft_mask": scalars or soft_masking.init_scalars()}
