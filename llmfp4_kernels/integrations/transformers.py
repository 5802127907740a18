"""transformers models: read dense ones, save and load quantized ones.

A saved folder is an ordinary transformers folder: config.json with a `quantization_config` of method "llmfp4", and
model.safetensors whose tensor names are those of FP4Linear. Importing this module registers the method.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..errors import BadFile, BadInput, LLMFP4Error
from ..nn import FP4Module
from ..packed import FORMAT, VERSION, open_safetensors, path_of, write_safetensors
from .attention import AttentionOperands, attention_operands, use_attention
from .layers import empty_layer, fill_tree, layer_entries, share_codes, tensors_to_save

WEIGHTS = "model.safetensors"


@register_quantization_config(FORMAT)
class LLMFP4Config(QuantizationConfigMixin):
    """layers: those of layers.layer_entries; attention: {module name: AttentionOperands.to_dict()}."""

    def __init__(self, layers: dict | None = None, version: int = VERSION, attention: dict | None = None, **kwargs):
        self.quant_method = FORMAT
        self.layers, self.version, self.attention = layers or {}, version, attention or {}


def _operands(attention: dict[str, dict]) -> dict[str, AttentionOperands]:
    return {name: AttentionOperands.from_dict(entry) for name, entry in attention.items()}


@register_quantizer(FORMAT)
class LLMFP4Quantizer(HfQuantizer):
    """Puts empty FP4 layers into a model on meta, so that loading never materialises their full-precision weights."""

    requires_calibration = False
    is_compileable = True
    is_trainable = True

    def validate_environment(self, *args, **kwargs):
        if not self.pre_quantized:
            raise BadInput("llmfp4 quantizes with quantize_model and calibration data, not while loading a dense model")

    def _process_model_before_weight_loading(self, model, dtype=None, **kwargs):
        self.dtype = dtype or torch.get_default_dtype()
        for name, entry in self.quantization_config.layers.items():
            # A module without tensors stands in for a table that will share a head's: the file has none of its own.
            layer = nn.Module() if "shares" in entry else empty_layer(entry, self.dtype)
            layer._is_hf_initialized = True
            model.set_submodule(name, layer)

    def _process_model_after_weight_loading(self, model, **kwargs):
        for name in self.quantization_config.layers:
            layer = model.get_submodule(name)
            bias = getattr(layer, "bias", None)
            if bias is not None:
                bias.requires_grad_(False)  # the loader made it trainable; frozen, it is added inside the kernel
            if isinstance(layer, FP4Module):
                layer.spec()  # the loader sets parameters past load_state_dict, and a trace could not read them
        share_codes(model, self.quantization_config.layers, self.dtype)
        if self.quantization_config.attention:
            use_attention(model, _operands(self.quantization_config.attention))

    def is_serializable(self, *args, **kwargs):
        raise BadInput("save_pretrained does not write FP4 layers: use save_quantized(model, folder)")


def refuse_save_pretrained(model: PreTrainedModel) -> None:
    """What save_pretrained would write of a model with FP4 layers says nothing of them: let it raise BadInput."""
    model.hf_quantizer = LLMFP4Quantizer(LLMFP4Config(), pre_quantized=True)


def load_dense(path: str | Path, dtype: torch.dtype = torch.float32):
    """(model, tokenizer) from a local transformers folder or a .gguf file. Raises BadFile if there is none."""
    path = path_of(path)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise BadFile(f"there is no file {path}")
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise BadFile(f"{path} ({path.stat().st_size} bytes) does not start with GGUF")
        where, source = path.parent, {"gguf_file": path.name}
    else:
        if not (path / "config.json").is_file():
            raise BadFile(f"{path} is no transformers folder: it has no config.json")
        require_tokenizer(path)
        where, source = path, {}
    try:
        config = AutoConfig.from_pretrained(where, local_files_only=True, **source)
        tokenizer = AutoTokenizer.from_pretrained(where, local_files_only=True, **source)
        model = _read(config, where, dtype=dtype, **source)
    except LLMFP4Error:
        raise
    except Exception as error:  # a damaged file raises whatever three libraries raise
        raise BadFile(f"{path} cannot be read as a model: {type(error).__name__}: {error}") from error
    if source:
        # The weights are plain floats now; the mark of the file format would forbid saving them.
        for attribute in ("hf_quantizer", "quantization_method", "is_quantized"):
            if hasattr(model, attribute):
                delattr(model, attribute)
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
    return model.eval(), tokenizer


def _model_class(config):
    """The class that wrote the checkpoint, so that encoders and classifiers load as what they are."""
    names = config.architectures or []
    return getattr(transformers, names[0], None) if names else transformers.AutoModelForCausalLM


def _read(config, path, **options):
    """from_pretrained on local files. Raises BadFile if a tensor of the model is missing: it would be random."""
    options |= {"local_files_only": True, "use_safetensors": True, "output_loading_info": True}
    model, loaded = _model_class(config).from_pretrained(path, **options)
    missing = sorted(loaded["missing_keys"])
    if missing:
        raise BadFile(f"{path} lacks {len(missing)} tensors of {type(model).__name__}, such as {missing[0]}")
    return model


def _config(model: nn.Module, entries: dict[str, dict], attention: dict[str, dict]) -> dict:
    """config.json of a model; of a tree that is none of transformers' it names the class and its FP4 layers only."""
    config = {"architectures": [type(model).__name__]}
    if isinstance(model, PreTrainedModel):
        config = model.config.to_dict() | config
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        config["dtype"] = str(dtype).removeprefix("torch.")
        ends = (model.get_input_embeddings(), model.get_output_embeddings())
        if any(isinstance(end, FP4Module) for end in ends):
            config["tie_word_embeddings"] = False  # packed layers share by name, see `layers`
    return config | {"quantization_config": LLMFP4Config(entries, attention=attention).to_dict()}


def save_quantized(model: nn.Module, out_dir: str | Path, tokenizer=None, report=None) -> None:
    """Write a quantized model: config.json, model.safetensors, tokenizer files, quantization_report.json.

    The folder is written beside `out_dir` and renamed, so an interrupted save leaves the old folder or none.
    Raises BadInput for a model without FP4 layers and FP4 attention.
    """
    entries = layer_entries(model)
    attention = {name: operands.to_dict() for name, operands in attention_operands(model).items()}
    if not entries and not attention:
        raise BadInput(f"{type(model).__name__} has no FP4 layer: quantize_model comes first")
    out_dir = path_of(out_dir)
    if out_dir.exists() and not out_dir.is_dir():
        raise BadInput(f"{out_dir} is a file: a model is saved as a folder")
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}.", dir=out_dir.parent))
    try:
        config = _config(model, entries, attention)
        (beside / "config.json").write_text(json.dumps(config, indent=1))
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(beside)
        metadata = {"format": "pt", FORMAT: json.dumps({"version": VERSION})}
        # Where nothing is tied, transformers looks for every name.
        tensors = tensors_to_save(model, entries, once=config.get("tie_word_embeddings", True))
        write_safetensors(beside / WEIGHTS, tensors, metadata)
        if tokenizer is not None:
            tokenizer.save_pretrained(beside)
        if report is not None:
            (beside / "quantization_report.json").write_text(report.to_json())
        _replace_folder(beside, out_dir)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def _replace_folder(new: Path, path: Path) -> None:
    os.chmod(new, 0o755)
    if path.exists():
        if any(path.iterdir()) and not (path / "config.json").is_file():
            raise BadInput(f"{path} exists and is no model folder: it is not replaced")
        old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
        path.rename(old / "old")
        new.rename(path)
        shutil.rmtree(old)
    else:
        new.rename(path)


def _described(config_file: Path, name: str, entry) -> FP4Module:
    try:
        layer = empty_layer(entry, torch.float32)
        if (
            not isinstance(layer.group_size, int)
            or layer.group_size < 0
            or (layer.scale is None) != (layer.group_size == 0)
        ):
            raise ValueError(f"group_size {layer.group_size} with {layer.scale.name if layer.scale else 'no'} scales")
        return layer
    except (LLMFP4Error, TypeError, KeyError, AttributeError, ValueError, RuntimeError) as error:
        raise BadFile(f"{config_file} describes layer {name} as {entry!r}, which is none: {error!r}") from error


def _check_folder(path: Path) -> dict:
    """The config of a folder that save_quantized wrote, after a look at the header of its weights."""
    config_file = path / "config.json"
    if not config_file.is_file():
        raise BadFile(f"{path} is no model folder: it has no config.json")
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
        quantization = config.get("quantization_config") or {}
        quantization.get("quant_method")
    except (ValueError, AttributeError) as error:  # no JSON, no UTF-8, no dict
        raise BadFile(f"{config_file} is not JSON of a model: {error}") from error
    if quantization.get("quant_method") != FORMAT or quantization.get("version") != VERSION:
        found = f"method {quantization.get('quant_method')!r} version {quantization.get('version')!r}"
        raise BadFile(f"{path} holds {found}, expected method {FORMAT!r} version {VERSION}")
    if not isinstance(quantization.get("layers"), dict):
        raise BadFile(f"{config_file} names no layers of format {FORMAT!r}")
    try:
        _operands(quantization.get("attention") or {})
    except (BadInput, AttributeError) as error:
        raise BadFile(f"{config_file} describes attention that this package does not know: {error}") from error
    with open_safetensors(path / WEIGHTS) as file:
        present = set(file.keys())
        for name, entry in quantization["layers"].items():
            for tensor, expected in _described(config_file, name, entry).state_dict().items():
                key = f"{name}.{tensor}"
                if "shares" in entry:
                    continue
                if key not in present:
                    raise BadFile(f"{path / WEIGHTS} lacks {key}, one of {len(quantization['layers'])} packed layers")
                found = file.get_slice(key)
                if tensor != "bias" and (found.get_shape() != list(expected.shape) or found.get_dtype() != "U8"):
                    shape = f"{found.get_dtype()} {found.get_shape()}"
                    raise BadFile(f"{key} in {path / WEIGHTS} is {shape}, expected U8 {list(expected.shape)}")
    return config


def load_quantized(path: str | Path, model: nn.Module | None = None):
    """The model that save_quantized wrote, in eval mode. Full-precision weights of quantized layers never exist.

    A model that is none of transformers' is built by you: give its dense tree as `model`, which is filled in place.
    Raises BadFile for a missing, truncated or foreign folder, before anything is built.
    """
    path = path_of(path)
    config = _check_folder(path)
    if model is not None:
        return fill_tree(model, path / WEIGHTS, config["quantization_config"]["layers"]).eval()
    if "model_type" not in config:
        raise BadFile(
            f"{path} holds a {config.get('architectures')}, no transformers model: give its dense tree as `model`"
        )
    config = AutoConfig.from_pretrained(path, local_files_only=True)
    return _read(config, path, dtype=config.dtype).eval()


def require_tokenizer(path: str | Path) -> None:
    """Raise BadFile for a folder without a tokenizer's files."""
    path, names = path_of(path), ("tokenizer*", "vocab*", "*.model")
    if not any(found for name in names for found in path.glob(name)):
        raise BadFile(f"{path} has no tokenizer beside its model, no file {', '.join(names)}: save one there")


def load_tokenizer(path: str | Path):
    """The tokenizer saved beside a model. Raises BadFile if there is none, or a damaged one."""
    require_tokenizer(path)
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except Exception as error:  # a damaged file raises whatever two libraries raise
        raise BadFile(
            f"the tokenizer in {path} cannot be read: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
        ) from error
