"""Each part of a model like Stable Diffusion: read from and written to its folder in diffusers' layout."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from mmtrain.config_errors import UserError, clip, nearest
from mmtrain.storyweaver.weight_files import fill, find_weights, read_weight_files

if TYPE_CHECKING:  # importing these takes seconds
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    from mmtrain.storyweaver.patch_autoencoder import PatchAutoencoder

OBJECTIVES = {"epsilon": "eps", "v_prediction": "v"}
VAES = ("AutoencoderKL", "PatchAutoencoder")
SCHEDULE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
DIFFUSERS_WEIGHTS, TRANSFORMERS_WEIGHTS = ("diffusion_pytorch_model",), ("model", "pytorch_model")
OLD_ATTENTION = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
TEXT_PREFIX = "text_model."  # of every released text encoder; transformers 5 has it in files only


def read_unet(folder: str | Path) -> "UNet2DConditionModel":
    """A UNet from its folder in diffusers' layout, in the types of its file.

    Raises:
        UserError: no such UNet there.
    """
    from diffusers import UNet2DConditionModel

    config = read_config(Path(folder))
    _check_class(config, ("UNet2DConditionModel",), folder)
    if config.get("addition_embed_type"):
        raise UserError(f"{folder}: addition_embed_type {config['addition_embed_type']}, expected a UNet of text alone")
    return _read_model(UNet2DConditionModel, Path(folder), config)


def read_vae(folder: str | Path) -> "AutoencoderKL | PatchAutoencoder":
    """An autoencoder from its folder in diffusers' layout, in the types of its file.

    Raises:
        UserError: no such autoencoder there.
    """
    from diffusers import AutoencoderKL

    config = read_config(Path(folder))
    _check_class(config, VAES, folder)
    if config.get("_class_name") == "PatchAutoencoder":
        from mmtrain.storyweaver.patch_autoencoder import PatchAutoencoder

        return _read_model(PatchAutoencoder, Path(folder), config)
    return _read_model(AutoencoderKL, Path(folder), config)


def read_text_encoder(folder: str | Path) -> "CLIPTextModel":
    """CLIP's text encoder from its folder, whether its names begin with `text_model.` or not.

    Raises:
        UserError: no such text encoder there.
    """
    from transformers import CLIPTextConfig

    config = read_config(Path(folder))
    if config.get("model_type", "clip_text_model") not in ("clip_text_model", "clip"):
        raise UserError(f"{folder}: model_type {config['model_type']}, expected CLIP's text encoder (clip_text_model)")
    files = find_weights(Path(folder), TRANSFORMERS_WEIGHTS)
    state = read_weight_files(files)
    with naming(folder):
        model = empty_text_encoder(CLIPTextConfig.from_dict(config.get("text_config") or config))
    fill_text_encoder(model, state, files[0])
    return model


def empty_text_encoder(config: Any) -> "CLIPTextModel":
    """A text encoder whose weights are not there yet."""
    from accelerate import init_empty_weights
    from transformers import CLIPTextModel

    with init_empty_weights():
        return CLIPTextModel(config).eval()


def fill_text_encoder(model: "CLIPTextModel", state: Mapping[str, torch.Tensor], where: str | Path) -> None:
    """Load the weights of a text encoder under the names of any version of transformers.

    Raises:
        UserError: they do not fit.
    """
    plain = {name.removeprefix(TEXT_PREFIX): value for name, value in state.items()}
    plain = {name: value for name, value in plain.items() if name != "embeddings.position_ids"}
    has_prefix = next(iter(model.state_dict())).startswith(TEXT_PREFIX)  # transformers 4
    fill(model, {TEXT_PREFIX + name: value for name, value in plain.items()} if has_prefix else plain, where)


def read_objective(folder: str | Path) -> str:
    """What a model predicts, "eps" or "v", from its scheduler's folder.

    Raises:
        UserError: no scheduler there, or another noise schedule than Stable Diffusion's.
    """
    file = Path(folder) / "scheduler_config.json"
    config = _read_json(file)
    for key, expected in SCHEDULE.items():
        if config.get(key) != expected:
            raise UserError(f"{file}: {key} is {config.get(key)!r}, expected Stable Diffusion's {expected!r}")
    for key in ("trained_betas", "rescale_betas_zero_snr"):
        if config.get(key):
            raise UserError(f"{file}: {key} is {clip(config[key])}, expected Stable Diffusion's noise schedule")
    predicts = config.get("prediction_type", "epsilon")
    if predicts not in OBJECTIVES:
        raise UserError(f"{file}: prediction_type is {predicts!r}, expected one of {', '.join(OBJECTIVES)}")
    return OBJECTIVES[predicts]


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a part.

    Raises:
        UserError: none there, or no JSON object.
    """
    return _read_json(folder / "config.json")


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise UserError(f"{file}: no such file")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: no JSON ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{file}: holds a {type(content).__name__}, expected an object")
    return content


def _check_class(config: Mapping[str, Any], expected: tuple[str, ...], folder: str | Path) -> None:
    name = config.get("_class_name", expected[0])
    if name not in expected:
        hint = f", did you mean {near}?" if (near := nearest(name, expected)) else ""
        raise UserError(f"{folder}: _class_name is {name}, expected {' or '.join(expected)}{hint}")


def _read_model(kind: type, folder: Path, config: dict[str, Any]) -> Any:
    files = find_weights(folder, DIFFUSERS_WEIGHTS)
    state = read_weight_files(files)
    if kind.__name__ == "AutoencoderKL":
        state = {_modern(name): value for name, value in state.items()}
    model = empty_model(kind, config, folder)
    fill(model, state, files[0])
    return model


def _modern(name: str) -> str:
    """The name that diffusers gives since 2023 to a weight of an autoencoder's attention."""
    for old, new in OLD_ATTENTION.items():
        name = name.replace(old, new) if ".attentions." in name else name
    return name


def empty_model(kind: type, config: Mapping[str, Any], where: str | Path) -> Any:
    """A model of diffusers from its configuration, whose weights are not there yet.

    Raises:
        UserError: the configuration is none of such a model.
    """
    from accelerate import init_empty_weights

    with naming(where), init_empty_weights():
        return kind.from_config(dict(config)).eval()


@contextmanager
def naming(where: str | Path) -> Iterator[None]:
    """Turn what a library says of a wrong configuration into one message that names the folder."""
    try:
        yield
    except (ValueError, TypeError, KeyError, IndexError, ZeroDivisionError, AttributeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{where}: configuration or names of such a model are missing or wrong ({reason[:160]})"
        ) from error


def save_model(model: Any, folder: Path) -> None:
    """Write a UNet or an autoencoder, without the place that it was read from."""
    model.save_pretrained(str(folder), max_shard_size="20GB")  # one file, as the released ones are
    config = read_config(folder)
    config.pop("_name_or_path", None)
    write_json(folder / "config.json", config)


def save_text_encoder(text_encoder: "CLIPTextModel", folder: Path) -> None:
    """Write a text encoder with the names of the released ones, which every version of transformers reads."""
    folder.mkdir(parents=True, exist_ok=True)
    config = text_encoder.config.to_dict() | {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model"}
    config = {key: value for key, value in config.items() if key not in ("_name_or_path", "dtype", "torch_dtype")}
    write_json(folder / "config.json", config | {"torch_dtype": str(text_encoder.dtype).removeprefix("torch.")})
    state = {
        TEXT_PREFIX + name.removeprefix(TEXT_PREFIX): value.detach().contiguous().cpu()
        for name, value in text_encoder.state_dict().items()
    }
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def save_tokenizer(tokenizer: "CLIPTokenizer", folder: Path) -> None:
    """Write a tokenizer, with the two files that transformers before version 5 needs."""
    tokenizer.save_pretrained(str(folder))
    if (folder / "vocab.json").is_file():
        return
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    write_json(folder / "vocab.json", model["vocab"])
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object for people to read."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
