"""Checkpoints in safetensors that somebody quantised: which tensors belong together.

config.json names the method (`quantization_config`). A weight of codes and the tensors beside it
become one `TensorSpec` with the shape of the parameter, so that what comes after need not know:
names are matched to parameters, experts are found, rows are cut into pieces. A weight that is
stored as floats is what it seems: exceptions (`modules_to_not_convert`, `ignore`) need no list.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from flexinfer.formats.tensors import (
    ENCODINGS,
    Beside,
    CheckpointError,
    Encoding,
    Packed,
    TensorSpec,
)
from flexinfer.messages import shown

Tensors = dict[str, TensorSpec]
# Schemes of codes of a number each, by the encoding.
SCHEMES = {"F8_E4M3": "f8_e4m3", "F8_E5M2": "f8_e5m2", "I8": "i8"}
# Two numbers of four bits to a byte.
E2M1, INT4 = Encoding("E2M1", 2, 1), Encoding("I4", 2, 1)
# Numbers of a row that share a scale, in MXFP4.
MXFP4_GROUP = 32


def unpacked(tensors: Tensors, quantization: Mapping[str, Any]) -> Tensors:
    """The tensors of a checkpoint that was quantised as `quantization`, its quantization_config,
    says: what lies beside a weight is part of it.

    Raises CheckpointError for a method that is not known here, and for tensors that do not fit.
    """
    method = quantization.get("quant_method")
    if method not in METHODS:
        by = "an earlier version of flexinfer" if method == "flexinfer" else shown(method)
        raise CheckpointError(
            f"quantization_config: this checkpoint is quantised by {by}, which is not supported "
            f"({', '.join(METHODS)} are); take the original checkpoint and, if it should be small, "
            "run `flexinfer quantize SRC DST --type q4_k`"
        )
    return METHODS[method](tensors, quantization)


def _fp8(tensors: Tensors, quantization: Mapping[str, Any]) -> Tensors:
    """Float8 with a scale for each block, row or tensor; scales of activations are for kernels that
    quantise those too.
    """
    return _scaled(tensors, quantization.get("weight_block_size"), in_scale_dtype=False)


def _scaled(tensors: Tensors, block: Any, *, in_scale_dtype: bool) -> Tensors:
    """NAME.weight in codes of a number each, and beside it scales by a name of SCALES."""
    found = dict(tensors)
    for name, spec in tensors.items():
        if name.endswith(OF_ACTIVATIONS):
            del found[name]
        elif spec.encoding.name in SCHEMES and len(spec.shape) > 1 and not name.endswith(ZEROS):
            scales = next((one for one in _scales_of(name) if one in tensors), None)
            if scales is None:
                raise CheckpointError(
                    f"{spec.file}: {shown(name)} is {spec.dtype}, and no scale is beside it "
                    f"({shown(name + '_scale')}); the checkpoint is incomplete, download it again"
                )
            beside = [_beside(spec, found.pop(scales), block)]
            if (zeros := found.pop(name + ZEROS, None)) is not None:
                beside.append(_beside(spec, zeros, None))
            packed = Packed(SCHEMES[spec.encoding.name], tuple(beside), in_scale_dtype)
            found[name] = replace(spec, packed=packed)
    return found


def _compressed(tensors: Tensors, quantization: Mapping[str, Any]) -> Tensors:
    """compressed-tensors: codes of a number each, or of 4 or 8 bits packed to int32 along the rows
    (NAME.weight_packed), with scales for a tensor, a row, or a group of a row.
    """
    formats = {quantization.get("format")}
    groups = quantization.get("config_groups")
    weights = []
    for group in groups.values() if isinstance(groups, dict) else ():
        formats.add(group.get("format") or quantization.get("format"))
        weights.append(group["weights"])
    if unknown := sorted(map(str, formats - COMPRESSED_FORMATS)):
        raise CheckpointError(
            f"quantization_config: format {shown(unknown[0])} of compressed-tensors is not "
            f"supported; {', '.join(sorted(map(str, COMPRESSED_FORMATS)))} are"
        )
    bits = {one["num_bits"] for one in weights if one.get("type") == "int"}
    found = dict(tensors)
    for name, spec in tensors.items():
        if name.endswith(".weight_g_idx"):
            raise CheckpointError(
                f"{spec.file}: {shown(name)}: columns in another order (actorder) are not "
                "supported; take the original checkpoint"
            )
        if not name.endswith(".weight_packed"):
            continue
        stem = name.removesuffix("_packed")
        if not bits <= {4, 8} or len(bits) != 1 or spec.dtype != "I32" or len(spec.shape) != 2:
            raise CheckpointError(
                f"{spec.file}: {shown(name)}: weights of {sorted(bits)} bits in {spec.dtype} are "
                "not supported; 4 or 8 bits in I32 are"
            )
        if f"{stem}_scale" not in tensors:
            raise CheckpointError(
                f"{spec.file}: {shown(name)} has no scales beside it ({shown(stem + '_scale')}); "
                "the checkpoint is incomplete, download it again"
            )
        (width,) = bits
        whole = replace(
            found.pop(name),
            name=stem,
            shape=(spec.shape[0], spec.shape[1] * 32 // width),
            encoding=INT4 if width == 4 else ENCODINGS["U8"],
        )
        beside = [_beside(whole, found.pop(f"{stem}_scale"), None)]
        if (zeros := found.pop(stem + ZEROS, None)) is not None:
            columns = whole.shape[1] // max(1, zeros.shape[-1])
            beside.append(Beside(zeros, 32 // width, columns))
        found.pop(f"{stem}_shape", None)
        packed = Packed("i4" if width == 4 else "u8", tuple(beside), in_scale_dtype=True)
        found[stem] = replace(whole, packed=packed)
    return _scaled(found, None, in_scale_dtype=True)


def _scales_of(name: str) -> list[str]:
    """What the scales of a weight may be called."""
    stem = name.removesuffix(".weight")
    return [f"{name}_scale_inv", f"{name}_scale", f"{stem}.qscale_weight", f"{stem}.scale"]


ZEROS = "_zero_point"
OF_ACTIVATIONS = (".activation_scale", ".input_scale", ".qscale_act")
COMPRESSED_FORMATS = {"pack-quantized", "float-quantized", "int-quantized", "naive-quantized"}


def _mxfp4(tensors: Tensors, quantization: Mapping[str, Any]) -> Tensors:
    """gpt-oss: NAME_blocks [..., rows, groups, 16], a scale (an exponent) for each group."""
    found: Tensors = {}
    for name, spec in tensors.items():
        if name.endswith("_scales") and name.removesuffix("_scales") + "_blocks" in tensors:
            continue
        if name.endswith("_blocks"):
            scales = tensors.get(name.removesuffix("_blocks") + "_scales")
            if scales is None or scales.shape != spec.shape[:-1] or spec.dtype != "U8":
                raise CheckpointError(
                    f"{spec.file}: {shown(name)} has no scales that fit it; the checkpoint is "
                    "incomplete, download it again"
                )
            shape = *spec.shape[:-2], spec.shape[-2] * MXFP4_GROUP
            beside = Beside(scales, 1, MXFP4_GROUP)
            spec = replace(
                spec,
                name=name.removesuffix("_blocks"),
                encoding=E2M1,
                shape=shape,
                packed=Packed("e2m1", (beside,)),
            )
        found[spec.name] = spec
    return found


def _beside(spec: TensorSpec, scale: TensorSpec, block: Any) -> Beside:
    """Which numbers of `spec` [..., rows, width] one of `scale` is for.

    Raises CheckpointError where their shapes do not go together.
    """
    (rows, width), shape = spec.shape[-2:], scale.shape[len(spec.shape) - 2 :]
    if scale.elements == 1 and len(spec.shape) == 2:
        return Beside(replace(scale, shape=(1, 1)), None, width)
    if len(shape) == 1:
        shape = *shape, 1
    count, columns = shape if len(shape) == 2 else (0, 0)
    sizes = block if block else (rows // max(count, 1), width // max(columns, 1))
    fits = [-(-rows // size) for size in sizes[:1]] + [-(-width // size) for size in sizes[1:]]
    if [count, columns] != fits:
        sizes = rows // max(count, 1), width // max(columns, 1)
        if count * sizes[0] != rows or columns * sizes[1] != width:
            raise CheckpointError(
                f"{scale.file}: {shown(scale.name)} has shape {shown(list(scale.shape))}, which "
                f"does not go with {shown(list(spec.shape))} of {shown(spec.name)}; download the "
                "checkpoint again"
            )
    return Beside(replace(scale, shape=(*spec.shape[:-2], count, columns)), *sizes)


METHODS: dict[str, Callable[[Tensors, Mapping[str, Any]], Tensors]] = {
    "fp8": _fp8,
    "mxfp4": _mxfp4,
    "compressed-tensors": _compressed,
}
