"""`voicepass token`: test tokens for curl."""

import json
import time
from typing import Annotated, Any

import typer
from jose import jwt

from voicepass.cli.failures import fail
from voicepass.config.build import read_own_issuer
from voicepass.config.issuers import decode_secret
from voicepass.config.settings import load_settings


def create_token(
    user: Annotated[str, typer.Option(help="The user's id, for the claim VOICEPASS_USER_ID_CLAIM.")],
    name: Annotated[str | None, typer.Option(help="The user's name, for the claim VOICEPASS_USER_NAME_CLAIM.")] = None,
    ttl: Annotated[int, typer.Option(min=1, help="Seconds until the token expires.")] = 3600,
    claim: Annotated[list[str] | None, typer.Option(help="Add a claim, key=value or key=JSON; repeatable.")] = None,
) -> None:
    """Print a test JWT for curl, signed with your VOICEPASS_JWT_SECRET."""
    settings = load_settings()
    issuer = read_own_issuer(settings)
    if issuer.secret_env is None:
        fail([f"VOICEPASS_JWT_ALGORITHM is {issuer.algorithm}: only your identity provider can sign such tokens"])
    now = int(time.time())
    claims: dict[str, Any] = {
        "iss": issuer.issuer,
        "aud": issuer.audience,
        "sub": user,
        "iat": now,
        "exp": now + ttl,
        issuer.user_id_claim: user,
    }
    if name is not None:
        claims[issuer.user_name_claim] = name
    for entry in claim or ():
        key, separator, value = entry.partition("=")
        if not separator:
            raise typer.BadParameter("write key=value", param_hint="--claim")
        claims[key] = _parse_value(value)
    secret = decode_secret(settings.read_secret(issuer.secret_env))
    typer.echo(jwt.encode(claims, secret.encode("utf-8", "surrogateescape"), issuer.algorithm))


def _parse_value(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return text
