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
# Ends of the names of other tensors than weights and scales.
ZEROS = "_zero_point"
OF_ACTIVATIONS = (".activation_scale", ".input_scale", ".qscale_act")
COMPRESSED_FORMATS = {"pack-quantized", "float-quantized", "int-quantized", "naive-quantized"}
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
    found = METHODS[method](tensors, quantization)
    if not any(spec.packed for spec in found.values()):
        raise CheckpointError(
            f"quantization_config says {method}, but no tensor is quantised so; if the weights are "
            "floats, remove the entry"
        )
    return found


def _fp8(tensors: Tensors, quantization: Mapping[str, Any]) -> Tensors:
    """Float8 with a scale for each block, row or tensor; scales of activations are for kernels that
    quantise those too.
    """
    return _scaled(tensors, quantization.get("weight_block_size"), in_scale_dtype=False)


def _scaled(tensors: Tensors, block: Any, *, in_scale_dtype: bool) -> Tensors:
    """Weights in codes of a number each, with scales of a block, a row or the tensor beside them.

    block: (rows, columns) that share a scale, where the shapes do not say.
    """
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
            beside.append(_packed_zeros(whole, zeros, 32 // width))
        found.pop(f"{stem}_shape", None)
        packed = Packed("i4" if width == 4 else "u8", tuple(beside), in_scale_dtype=True)
        found[stem] = replace(whole, packed=packed)
    return _scaled(found, None, in_scale_dtype=True)


def _by_inputs(tensors: Tensors, quantization: Mapping[str, Any]) -> Tensors:
    """AWQ and GPTQ: NAME.qweight with inputs for rows, several codes to an int32; beside it scales
    and zeros of groups of inputs and, with desc_act, the group of each.
    """
    method, bits = quantization["quant_method"], int(quantization.get("bits") or 0)
    layout = str(
        quantization.get("version")
        or quantization.get("checkpoint_format")
        or quantization.get("format")
        or ("gemm" if method == "awq" else "gptq")
    ).lower()
    known = {"gemm": "awq"} if method == "awq" else {"gptq": "gptq", "gptq_v2": "gptq_v2"}
    if layout not in known or bits not in ((4,) if method == "awq" else (4, 8)):
        raise CheckpointError(
            f"quantization_config: {method} in {shown(layout)} with {shown(bits)} bits is not "
            f"supported; {', '.join(known)} with 4 bits{'' if method == 'awq' else ' or 8'} is"
        )
    each, found = 32 // bits, dict(tensors)
    for name, spec in tensors.items():
        stem, _, end = name.rpartition(".")
        if end != "qweight":
            continue
        beside = [tensors.get(f"{stem}.{one}") for one in ("scales", "qzeros", "g_idx")]
        for one in (spec, *beside):
            if one is not None:
                found.pop(one.name, None)
        if len(spec.shape) != 2 or spec.dtype != "I32" or beside[0] is None or beside[1] is None:
            raise CheckpointError(
                f"{spec.file}: {shown(name)} has no scales and zeros beside it, or is no matrix of "
                "I32; the checkpoint is incomplete, download it again"
            )
        inputs, outputs = spec.shape
        inputs, outputs = (inputs, outputs * each) if method == "awq" else (inputs * each, outputs)
        whole = replace(
            spec,
            name=f"{stem}.weight",
            shape=(outputs, inputs),
            encoding=INT4 if bits == 4 else ENCODINGS["U8"],
        )
        groups = beside[0].shape[0] if beside[0].shape else 0
        wanted = [(groups, outputs), (groups, outputs // each), (inputs,)]
        for one, shape in zip(beside, wanted, strict=True):
            if one is not None and (one.shape != shape or not groups or outputs % each):
                raise CheckpointError(_do_not_go_together(whole, one))
        if beside[2] is None and inputs % groups:
            raise CheckpointError(_do_not_go_together(whole, beside[0]))
        sides = tuple(Beside(one, None, 1) for one in beside if one is not None)
        packed = Packed(known[layout], sides, in_scale_dtype=True, by_inputs=True)
        found[whole.name] = replace(whole, packed=packed)
    return found


def _packed_zeros(spec: TensorSpec, zeros: TensorSpec, each: int) -> Beside:
    """Zeros of `each` rows to an int32, and of a group of columns."""
    rows, width = spec.shape
    groups = zeros.shape[-1] if len(zeros.shape) == 2 else 0
    fits = zeros.shape == (-(-rows // each), groups) and groups and width % groups == 0
    if not fits or zeros.dtype != "I32":
        raise CheckpointError(_do_not_go_together(spec, zeros))
    return Beside(zeros, each, width // groups)


def _do_not_go_together(spec: TensorSpec, beside: TensorSpec) -> str:
    return (
        f"{beside.file}: {shown(beside.name)} has shape {shown(list(beside.shape))}, which does "
        f"not go with {shown(list(spec.shape))} of {shown(spec.name)}; download the checkpoint "
        "again"
    )


def _scales_of(name: str) -> list[str]:
    """What the scales of a weight may be called."""
    stem = name.removesuffix(".weight")
    return [f"{name}_scale_inv", f"{name}_scale", f"{stem}.qscale_weight", f"{stem}.scale"]


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
    even = rows // max(count, 1), width // max(columns, 1)
    sizes = block or even
    if (count, columns) != (-(-rows // sizes[0]), -(-width // sizes[1])):
        sizes = even
        if count * sizes[0] != rows or columns * sizes[1] != width:
            raise CheckpointError(_do_not_go_together(spec, scale))
    return Beside(replace(scale, shape=(*spec.shape[:-2], count, columns)), *sizes)


METHODS: dict[str, Callable[[Tensors, Mapping[str, Any]], Tensors]] = {
    "fp8": _fp8,
    "mxfp4": _mxfp4,
    "compressed-tensors": _compressed,
    "awq": _by_inputs,
    "gptq": _by_inputs,
}
