"""The vendor's REST errors, read from `errors.toml`."""

import tomllib
from importlib.resources import files
from typing import Literal

from fastapi.responses import JSONResponse

Envelope = Literal["live", "legacy"]

_ERRORS = tomllib.loads(files(__package__).joinpath("errors.toml").read_text("utf-8"))


class VendorError(Exception):
    """Answers a call with an error, in the form of the live service or in its older one."""

    def __init__(
        self, http_status: int, detail: dict[str, str], *, envelope: Envelope = "live", retry_after: int | None = None
    ) -> None:
        super().__init__(detail["message"])
        if envelope == "legacy":
            detail = {"status": detail["status"], "message": detail["message"]}
        else:
            detail = detail | {"request_id": "req_emulated"}
        headers = {} if retry_after is None else {"retry-after": str(retry_after)}
        self.response = JSONResponse({"detail": detail}, http_status, headers)


def vendor_error(name: str, **facts: str) -> VendorError:
    """Return the error of this name in `errors.toml`; `facts` fill its message."""
    row = dict(_ERRORS[name])
    return VendorError(row.pop("http_status"), row | {"message": row["message"].format(**facts)})


def type_and_code(http_status: int) -> tuple[str, str]:
    """Return the type and the code that the vendor documents for an HTTP status."""
    error_type, code = _ERRORS["http"].get(str(http_status), ("internal_error", "internal_error"))
    return error_type, code
