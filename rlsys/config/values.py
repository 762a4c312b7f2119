"""Types of single values in the configuration."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

# Strict: a quoted number or a bool in place of a number is an error, not a guess.
Positive = Annotated[int, Field(gt=0, strict=True)]
NonNegative = Annotated[int, Field(ge=0, strict=True)]
Integer = Annotated[int, Field(strict=True)]
Float = Annotated[float, Field(strict=True, allow_inf_nan=False)]
PositiveFloat = Annotated[Float, Field(gt=0)]
NonNegativeFloat = Annotated[Float, Field(ge=0)]
Fraction = Annotated[Float, Field(ge=0, le=1)]
Flag = Annotated[bool, Field(strict=True)]
Dtype = Literal["float32", "bfloat16"]

# A group that composes to null until one of its keys is set, so that who does not use it does not read it; null is its
# defaults.
FOLDED = BeforeValidator(lambda given: {} if given is None else given)
