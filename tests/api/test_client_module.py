"""The browser client over HTTP: anyone may read it, caches must revalidate it, and only listed pages may import it."""

import httpx
import pytest

from tests.api.test_cors import HOSTILE, LISTED, OURS, add_origin, read_allowed_origin

pytestmark = pytest.mark.anyio

MODULE, TYPES = "/v1/client.js", "/v1/client.d.ts"


async def test_the_module_and_its_types_are_served_to_anyone(api: httpx.AsyncClient) -> None:
    module, types = await api.get(MODULE), await api.get(TYPES)

    assert "export function connect(" in module.text
    assert "export function connect(" in types.text
    assert module.headers["content-type"] == "text/javascript; charset=utf-8"
    assert types.headers["content-type"] == "text/plain; charset=utf-8"
    assert module.headers["x-content-type-options"] == "nosniff"
    assert module.headers["cross-origin-resource-policy"] == "same-site"


async def test_the_module_imports_nothing_and_stays_small(api: httpx.AsyncClient) -> None:
    module = (await api.get(MODULE)).text

    assert not any(line.startswith("import ") for line in module.splitlines())
    assert len(module) < 24_000


@pytest.mark.parametrize("path", [MODULE, TYPES])
async def test_a_cache_may_keep_the_module_and_must_revalidate_it_each_time(api: httpx.AsyncClient, path: str) -> None:
    first = await api.get(path)
    etag = first.headers["etag"]

    unchanged = [await api.get(path, headers={"if-none-match": sent}) for sent in (etag, f"W/{etag}", f'"old", {etag}')]
    changed = await api.get(path, headers={"if-none-match": '"old"'})

    assert first.headers["cache-control"] == "public, no-cache"
    assert {(r.status_code, r.content, r.headers["etag"]) for r in unchanged} == {(304, b"", etag)}
    assert {r.headers["cache-control"] for r in unchanged} == {"public, no-cache"}
    assert changed.status_code == 200


@pytest.mark.parametrize("api", [LISTED], indirect=True)
async def test_only_a_listed_page_may_import_the_module(api: httpx.AsyncClient) -> None:
    ours = await api.get(MODULE, headers={"origin": OURS})
    again = await api.get(MODULE, headers={"origin": OURS, "if-none-match": ours.headers["etag"]})
    foreign = [await api.get(MODULE, headers=add_origin(origin, {})) for origin in HOSTILE]

    assert [read_allowed_origin(ours), read_allowed_origin(again)] == [OURS, OURS]
    assert {read_allowed_origin(r) for r in foreign} == {None}
    assert all("origin" in r.headers["vary"].lower() for r in (ours, again, *foreign))
