"""The vendor's REST errors, read from `errors.toml`."""

import tomllib
from importlib.resources import files
from typing import Literal

from fastapi import HTTPException

Envelope = Literal["live", "legacy"]

_ERRORS = tomllib.loads(files(__package__).joinpath("errors.toml").read_text("utf-8"))


def vendor_error(name: str, **facts: str) -> HTTPException:
    """Return the error of this name in `errors.toml`; `facts` fill its message."""
    row = dict(_ERRORS[name])
    return make_error(row.pop("http_status"), row | {"message": row["message"].format(**facts)})


def make_error(http_status: int, detail: dict[str, str], *, envelope: Envelope = "live") -> HTTPException:
    """Return an error in the form of the live service, or in its older form."""
    if envelope == "legacy":
        return HTTPException(http_status, {"status": detail["status"], "message": detail["message"]})
    return HTTPException(http_status, detail | {"request_id": "req_emulated"})


def type_and_code(http_status: int) -> tuple[str, str]:
    """Return the type and the code that the vendor documents for an HTTP status."""
    error_type, code = _ERRORS["http"].get(str(http_status), ("internal_error", "internal_error"))
    return error_type, code
