"""The rope of a config.json, in the spellings that checkpoints have."""

import math

from scission.common.layers.rope import YarnScaling
from scission.common.model.fields import ConfigFields


def read_rope(fields: ConfigFields) -> tuple[float, YarnScaling | None]:
    """Base, and YaRN's blend where it is asked for.

    Newer files have both in `rope_parameters`, older ones `rope_scaling` beside `rope_theta`; the
    kind is `rope_type` or `type`.

    Raises:
        CheckpointError: names a field that is missing, or a kind of scaling that is not served.
    """
    if fields.has("rope_parameters"):
        section = fields.section("rope_parameters")
        theta = (section if section.has("rope_theta") else fields).number("rope_theta")
    else:
        theta = fields.number("rope_theta")
        if not fields.has("rope_scaling"):
            return theta, None
        section = fields.section("rope_scaling")
    kind = section.value("rope_type" if section.has("rope_type") else "type", str)
    if kind == "default":
        return theta, None
    if kind != "yarn":
        raise fields.error(f"rope type {kind!r} is not served; default and yarn are")
    return theta, _yarn(section)


def _yarn(section: ConfigFields) -> YarnScaling:
    factor = section.number("factor")
    return YarnScaling(
        factor=factor,
        original_max_positions=section.integer("original_max_position_embeddings"),
        beta_fast=section.number("beta_fast") if section.has("beta_fast") else 32.0,
        beta_slow=section.number("beta_slow") if section.has("beta_slow") else 1.0,
        rotation_scale=_rotation_scale(section, factor),
    )


def _rotation_scale(section: ConfigFields, factor: float) -> float:
    """Of cos and sin: 0.1 m ln(factor) + 1 for both mscales, one by the other; 1 for m without."""
    if section.has("attention_factor"):
        return section.number("attention_factor")

    def size(m: float) -> float:
        return 0.1 * m * math.log(factor) + 1 if factor > 1 else 1.0

    mscale, mscale_all = (
        section.number(name) if section.has(name) else 0.0 for name in ("mscale", "mscale_all_dim")
    )
    return size(mscale) / size(mscale_all) if mscale and mscale_all else size(1.0)
