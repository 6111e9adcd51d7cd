"""ggml's types of weights: how many numbers lie in how many bytes, and which types can be made. The
only list of them.
"""

from dataclasses import dataclass

# Command that installs what GGUF files and ggml's types need.
INSTALL = "pip install 'flexinfer[ggml]'"


class GgmlError(ValueError):
    """ggml is not there, or is asked for what it cannot do."""


@dataclass(frozen=True, slots=True)
class GgmlType:
    """How numbers lie in a file: `block_elements` of them in `block_bytes` bytes."""

    name: str
    # Its number in GGUF files and in ggml.
    id: int
    block_elements: int
    block_bytes: int

    def row_bytes(self, in_features: int) -> int:
        """Bytes of a row. Raises: GgmlError if the row does not end with a block."""
        blocks, rest = divmod(in_features, self.block_elements)
        if rest:
            raise GgmlError(
                f"{self.name}: rows of {in_features} are no multiple of {self.block_elements}"
            )
        return blocks * self.block_bytes


TYPES = {
    name: GgmlType(name, number, elements, nbytes)
    for name, number, elements, nbytes in (
        ("Q4_0", 2, 32, 18),
        ("Q4_1", 3, 32, 20),
        ("Q5_0", 6, 32, 22),
        ("Q5_1", 7, 32, 24),
        ("Q8_0", 8, 32, 34),
        ("Q2_K", 10, 256, 84),
        ("Q3_K", 11, 256, 110),
        ("Q4_K", 12, 256, 144),
        ("Q5_K", 13, 256, 176),
        ("Q6_K", 14, 256, 210),
        ("IQ2_XXS", 16, 256, 66),
        ("IQ2_XS", 17, 256, 74),
        ("IQ3_XXS", 18, 256, 98),
        ("IQ1_S", 19, 256, 50),
        ("IQ4_NL", 20, 32, 18),
        ("IQ3_S", 21, 256, 110),
        ("IQ2_S", 22, 256, 82),
        ("IQ4_XS", 23, 256, 136),
        ("IQ1_M", 29, 256, 56),
        ("TQ1_0", 34, 256, 54),
        ("TQ2_0", 35, 256, 66),
        ("MXFP4", 39, 32, 17),
        ("NVFP4", 40, 64, 36),
    )
}
# Those that weights are quantised to: the others need calibration, or are of models trained in
# them.
KINDS = (
    *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "IQ3_S"),
)
# The nearest type of at least as many bits for rows that are a multiple of 32 but not of 256.
KINDS_OF_32 = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
KINDS_OF_32 |= dict.fromkeys(("Q2_K", "Q3_K", "IQ3_S", "IQ4_XS"), "IQ4_NL")


def kind_for(kind: str, in_features: int) -> str | None:
    """The type of blocks for rows of `in_features`: `kind`, or the nearest of 32; None where there
    is none.
    """
    if in_features % TYPES[kind].block_elements == 0:
        return kind
    return KINDS_OF_32.get(kind) if in_features % 32 == 0 else None
