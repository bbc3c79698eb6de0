"""Users whom the app around voicepass signs in: what its own dependency returned becomes a checked User."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Final

from voicepass.errors import InternalError, TokenMissing
from voicepass.identity import parse_user_id
from voicepass.identity.credentials import check_page_of_app
from voicepass.model import Credentials, User

_SUBJECT: Final = "the dependency of voicepass.mount(user=…) returned"


@dataclass(frozen=True, slots=True)
class AppUsers:
    """Finds the user that the app's dependency returned for the request."""

    allowed_origins: Collection[str]

    async def authenticate(self, credentials: Credentials) -> User:
        """Return the user. Raises TokenMissing, OriginNotAllowed, or InternalError for what cannot be a user."""
        if credentials.app_user is None:
            raise TokenMissing("Sign in to start a conversation.")
        if not credentials.is_read:
            check_page_of_app(credentials, self.allowed_origins)
        return _check_user(credentials.app_user)


def _check_user(user: object) -> User:
    if not isinstance(user, User):
        raise InternalError(operator_note=f"{_SUBJECT} {type(user).__qualname__}: return a voicepass.User or None")
    if not (isinstance(user.issuer, str) and isinstance(user.name, str | None) and isinstance(user.claims, Mapping)):
        raise InternalError(operator_note=f"{_SUBJECT} a User whose issuer, name or claims have a wrong type")
    try:
        return replace(user, id=parse_user_id(user.id))
    except ValueError as error:
        raise InternalError(operator_note=f"{_SUBJECT} a User whose id is {error}") from error
