"""What all bodies of requests have in common: strict types, nulls that mean the default, unknown fields kept aside.

Fields that are known and not supported are refused (`unsupported.py`).
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from gear_server import unsupported

Int = Annotated[int, Field(strict=True)]  # no "5", no true, no 5.0
Int32 = Annotated[Int, Field(ge=-(2**31), le=2**31 - 1)]
Int64 = Annotated[Int, Field(ge=-(2**63), le=2**63 - 1)]
Flag = Annotated[bool, Field(strict=True)]
Number = Annotated[float, Field(strict=True)]
TokenIds = Annotated[list[Int], Field(fail_fast=True)]


class Body(BaseModel):
    """Drops nulls, refuses what is not supported, keeps what is unknown."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())
    UNSUPPORTED: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        unsupported.refuse_unsupported(value, cls.UNSUPPORTED)
        return {name: field for name, field in value.items() if field is not None}
