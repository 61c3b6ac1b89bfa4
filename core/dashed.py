"""Settings whose names are written with dashes where people or messages write them."""

from pydantic import ConfigDict

DASHED = ConfigDict(
    frozen=True,
    extra="forbid",
    allow_inf_nan=False,
    alias_generator=lambda name: name.replace("_", "-"),
    populate_by_name=True,
)
