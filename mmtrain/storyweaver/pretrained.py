"""The released layout of StoryWeaver: a folder `pipeline/` of diffusers, and `k_encoder.pt` beside it.

`k_encoder.pt` is a pickled module of a class that comes with the release, and reading a pickle can run any code. It is
read here without doing so: classes and functions other than those of such a module are refused, and those stand-ins
take the place of that only keep what the file says. Still it takes a command of its own:

    python -m mmtrain.storyweaver.pretrained convert k_encoder.pt k_encoder.safetensors
"""

import argparse
import math
import os
import pickle
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors.torch import save_file
from torch import Tensor

from mmtrain.config_errors import UserError
from mmtrain.storyweaver.pipeline import Components, load_components
from mmtrain.weight_files import read_weights

KNOWLEDGE = "k_encoder"
CLASS = "Autok_encoder"
CONVERT = "python -m mmtrain.storyweaver.pretrained convert"
NAMES = tuple(
    f"{head}_predictor.{layer}.{kind}" for head in ("mean", "cor") for layer in (0, 2, 3) for kind in ("weight", "bias")
)
STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "BoolStorage": torch.bool,
}
LAYERS = {
    "torch.nn.modules.linear": ("Linear",),
    "torch.nn.modules.activation": ("LeakyReLU", "Tanh"),
    "torch.nn.modules.normalization": ("LayerNorm",),
    "torch.nn.modules.container": ("Sequential",),
}


def load_released(folder: str | Path, where: str = "released") -> tuple[Components, dict[str, Tensor] | None]:
    """Read a released model.

    Args:
        folder: with `pipeline/` and k_encoder.safetensors or .pt; or a pipeline folder itself.
        where: the setting that named it, for messages.

    Returns:
        The parts, and the 12 tensors of the knowledge encoder, None if there is none.

    Raises:
        UserError: no such folder, or files that cannot be read, see `read_knowledge_encoder`.
    """
    folder = Path(folder)
    pipeline = folder / "pipeline" if (folder / "pipeline").is_dir() else folder
    components = load_components(pipeline, where)
    files = [folder / f"{KNOWLEDGE}.{extension}" for extension in ("safetensors", "pt")]
    found = next((file for file in files if file.is_file()), None)
    return components, None if found is None else read_knowledge_encoder(found)


def read_knowledge_encoder(path: str | Path) -> dict[str, Tensor]:
    """The 12 tensors of a knowledge encoder: of .safetensors, or of a PyTorch file that holds no code.

    Raises:
        UserError: no such file, other tensors, or a pickled module; says how to convert that.
    """
    path = Path(path)
    try:
        state = read_weights(path)
    except UserError as error:
        if not isinstance(error.__cause__, pickle.UnpicklingError):
            raise
        out = path.with_suffix(".safetensors")
        raise UserError(
            f"{path}: is a pickled module, which is not read by default, as a pickle can hold any code. Convert it once"
            f", which runs none:\n{CONVERT} {path} {out}"
        ) from error
    return _checked(state, path)


def convert_knowledge_encoder(path: str | Path, out: str | Path) -> dict[str, Tensor]:
    """Write the released `k_encoder.pt` as safetensors; no code of the file is run.

    Args:
        path: a module that `torch.save` wrote since PyTorch 1.6.
        out: file to write, whole or not at all.

    Returns:
        The 12 tensors, float32.

    Raises:
        UserError: no such file, one that holds anything else than such a module (named in the message), or `out` is
            the same file.
    """
    path, out = Path(path), Path(out)
    if out.exists() and path.exists() and out.samefile(path):
        raise UserError(f"{out}: is the file to convert itself")
    state = {name: value.float().contiguous() for name, value in _checked(read_module(path), path).items()}
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f".{out.name}.part")
    try:
        save_file(state, part, metadata={"format": "pt"})
        os.replace(part, out)
    finally:
        part.unlink(missing_ok=True)
    return state


def _checked(state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    missing = [name for name in NAMES if name not in state]
    unknown = [name for name in state if name not in NAMES]
    if missing or unknown:
        what = f"lacks {missing[0]}" if missing else f"has {unknown[0]}"
        raise UserError(f"{path}: is no knowledge encoder: {what}; expected {NAMES[0]} and {len(NAMES) - 1} others")
    return {name: state[name].detach() for name in NAMES}


def read_module(path: str | Path) -> dict[str, Tensor]:
    """Parameters and buffers of a pickled module, by name, without running code of the file.

    Raises:
        UserError: see `convert_knowledge_encoder`.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        with zipfile.ZipFile(path) as file:
            inside = next((name for name in file.namelist() if name.endswith("/data.pkl")), None)
            if inside is None:
                raise UserError(f"{path}: holds no data.pkl: torch.save did not write it")
            with file.open(inside) as content:
                module = _ModuleReader(content, file, inside.removesuffix("data.pkl"), path).load()
    except UserError:
        raise
    except zipfile.BadZipFile as error:
        raise UserError(f"{path}: is no file of torch.save since PyTorch 1.6") from error
    except Exception as error:  # what a wrong pickle leads to has no end
        raise UserError(f"{path}: damaged, or no pickled module ({type(error).__name__}: {error})") from error
    state = {}
    _collect(module, "", state, path)
    return state


class _Kept:
    """Stands for an object of a class that is not there: keeps its state, does nothing."""

    def __init__(self, *_: Any) -> None:
        self.kept: dict[str, Any] = {}

    def __new__(cls, *_: Any) -> "_Kept":
        made = super().__new__(cls)
        made.kept = {}
        return made

    def __setstate__(self, state: Any) -> None:
        self.kept = state if isinstance(state, dict) else {}


class _ModuleReader(pickle.Unpickler):
    """Reads a module that torch.save wrote; refuses every name that such a module does not need."""

    def __init__(self, content: Any, file: zipfile.ZipFile, folder: str, path: Path) -> None:
        super().__init__(content)
        self.file, self.folder, self.path = file, folder, path

    def find_class(self, module: str, name: str) -> Any:
        if name == CLASS or name in LAYERS.get(module, ()):
            return type(name, (_Kept,), {})
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        known = {
            ("collections", "OrderedDict"): OrderedDict,
            ("builtins", "set"): set,
            ("__builtin__", "set"): set,
            ("torch", "Size"): tuple,
            ("torch._utils", "_rebuild_tensor_v2"): _tensor,
            ("torch._utils", "_rebuild_parameter"): _parameter,
            ("torch.nn.parameter", "Parameter"): _parameter,
        }
        if (module, name) in known:
            return known[module, name]
        raise UserError(f"{self.path}: refused, it holds {module}.{name}, which a knowledge encoder does not need")

    def persistent_load(self, pid: Any) -> Tensor:
        """All numbers of a storage, which is a file of its own."""
        kind, dtype, key, _device, count = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise UserError(f"{self.path}: refused, it holds a {kind!r}")
        content = bytearray(self.file.read(f"{self.folder}data/{key}"))
        if not content:
            return torch.empty(0, dtype=dtype)
        return torch.frombuffer(content, dtype=dtype, count=count)


def _tensor(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    if math.prod(size) > storage.numel():
        raise ValueError(f"a tensor of size {size} in {storage.numel()} numbers")
    return torch.as_strided(storage, size, stride, offset).clone()


def _parameter(value: Tensor, *_: Any) -> Tensor:
    return value


def _collect(module: Any, prefix: str, state: dict[str, Tensor], path: Path) -> None:
    """Parameters and persistent buffers of a module and those inside it, into `state`."""
    if not isinstance(module, _Kept):
        raise UserError(f"{path}: holds a {type(module).__name__}, expected a pickled module of class {CLASS}")
    gone = module.kept.get("_non_persistent_buffers_set", set())
    own = {**module.kept.get("_parameters", {}), **module.kept.get("_buffers", {})}
    for name, value in own.items():
        if isinstance(value, Tensor) and name not in gone:
            state[prefix + name] = value
    for name, inside in module.kept.get("_modules", {}).items():
        if inside is not None:
            _collect(inside, f"{prefix}{name}.", state, path)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"mmtrain.storyweaver.pretrained: {message}")


def main(argv: list[str]) -> int:
    """Run `python -m mmtrain.storyweaver.pretrained convert IN OUT`.

    Raises:
        UserError: see `convert_knowledge_encoder`.
    """
    lines = _Parser("python -m mmtrain.storyweaver.pretrained", description="Files of the StoryWeaver release.")
    verbs = lines.add_subparsers(dest="verb", required=True)
    convert = verbs.add_parser(
        "convert",
        help="write k_encoder.pt as safetensors",
        description="Write k_encoder.pt as safetensors, run no code.",
    )
    convert.add_argument("source", metavar="IN", help="the released k_encoder.pt")
    convert.add_argument("out", metavar="OUT", help="file to write, for example k_encoder.safetensors")
    options = lines.parse_args(argv)
    state = convert_knowledge_encoder(options.source, options.out)
    print(f"wrote         {options.out}")
    print(f"parameters    {sum(value.numel() for value in state.values()):,}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
