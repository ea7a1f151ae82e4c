"""A quantised backbone on disk: `quantized.json`, `quantized.safetensors` and the tokenizer's files.

It is no folder for transformers, which knows neither form: there is no config.json. Tensors stand under the paths of
our model with the layers stacked: kernels as the stored integers and their float32 scales, all else in floats.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from softprompt_jax.checkpoints.tensors import Tensor, checksums, open_safetensors, read_stacked
from softprompt_jax.config import Settings, UserError, parse
from softprompt_jax.distributed.mesh import platform
from softprompt_jax.models.quantized import Quantization, quantization_of, quantized
from softprompt_jax.models.t5 import T5, T5Settings
from softprompt_jax.trees import flatten, unflatten

ABOUT, TENSORS = "quantized.json", "quantized.safetensors"


class About(Settings):
    """What stands in `quantized.json`."""

    quantize: Quantization
    settings: T5Settings
    fingerprint: str  # that of the float backbone: what was trained on one is taken by the other
    source: str  # what it was made from


def is_quantized_folder(source: str | Path) -> bool:
    """Is it the folder of a quantised backbone?"""
    return (Path(source).expanduser() / ABOUT).is_file()


def read_about(folder: str | Path) -> About:
    """Read what a quantised backbone is, without its weights."""
    path = Path(folder).expanduser() / ABOUT
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); expected what import --quantize wrote") from None
    return parse(About, values, str(path))


def save(model: T5, folder: Path, source: str, fingerprint: str) -> None:
    """Write a quantised model as it is: its floats stay in their dtype."""
    kind = quantization_of(model)
    if kind is None:
        raise UserError(f"{source}: is not quantised; expected a backbone in int8 or nf4; load it with quantize")
    about = About(quantize=kind, settings=model.settings, fingerprint=fingerprint, source=source)
    arrays = {path: np.asarray(leaf) for path, leaf in flatten(nnx.to_pure_dict(nnx.state(model))).items()}
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{TENSORS}.partial"
    save_file(arrays, partial, metadata=checksums(arrays))
    partial.replace(folder / TENSORS)
    (folder / ABOUT).write_text(json.dumps(about.model_dump(mode="json"), indent=2) + "\n")


def load(
    folder: str | Path,
    dtype: str,
    sharding: Callable[[nnx.Variable], jax.sharding.Sharding] | None,
    quantize: Quantization | None,
) -> T5:
    """Load a quantised backbone: integers and scales as they are, the rest as `dtype`, slices straight to place."""
    about = read_about(folder)
    if quantize not in (None, about.quantize):
        raise UserError(
            f"backbone {folder}: is stored in {about.quantize}; expected quantize: {about.quantize} or none, found "
            f"{quantize}; quantise the original"
        )
    settings = about.settings.model_copy(update={"platform": platform()})
    model = nnx.eval_shape(lambda: quantized(T5(settings, jax.random.key(0), dtype), about.quantize))
    graphdef, state = nnx.split(model)
    tensors = open_tensors(folder)
    one_device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def array(path: str, variable: nnx.Variable) -> jax.Array:
        exact = path.removesuffix(".scale").removesuffix(".kernel") + ".kernel" in kernels
        wanted = variable.dtype if exact else jnp.dtype(dtype)
        if path not in tensors or tensors[path].shape != variable.shape:
            found = list(tensors[path].shape) if path in tensors else "none"
            raise UserError(f"{folder}: {path}: found {found}; expected {list(variable.shape)}; import it again")
        return jax.make_array_from_callback(
            variable.shape,
            one_device if sharding is None else sharding(variable),
            lambda index: read_stacked([tensors[path]], variable.shape, index, wanted),
        )

    variables = flatten(nnx.to_pure_dict(state, extract_fn=lambda variable: variable))
    kernels = {path for path, variable in variables.items() if jnp.issubdtype(variable.dtype, jnp.integer)}
    nnx.replace_by_pure_dict(state, unflatten({path: array(path, variable) for path, variable in variables.items()}))
    return nnx.merge(graphdef, state)


def open_tensors(folder: str | Path) -> dict[str, Tensor]:
    """Open the stored tensors by their paths in the model; nothing is read yet."""
    return open_safetensors(Path(folder).expanduser() / TENSORS)


def describe(folder: str | Path) -> list[str]:
    """Say what a quantised backbone is."""
    about: dict[str, Any] = read_about(folder).model_dump()
    settings = about.pop("settings")
    return [f"  {name}: {value}" for name, value in {**about, **settings}.items()]
