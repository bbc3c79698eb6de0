"""The vendored SDK has exactly the files that its manifest lists, and the licences of what it includes."""

import hashlib
import json
from importlib.resources import files


def test_every_vendored_file_has_the_hash_and_size_of_the_manifest() -> None:
    folder = files("voicepass") / "demo/static/vendor/elevenlabs-client"
    manifest = json.loads((folder / "manifest.json").read_text())

    found = {
        name: {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
        for name in (
            "LICENSE",
            "THIRD-PARTY.txt",
            "lib.iife.js",
            "worklets/audioConcatProcessor.js",
            "worklets/rawAudioProcessor.js",
        )
        if (content := (folder / name).read_bytes())
    }

    assert manifest["name"] == "@elevenlabs/client"
    assert manifest["files"] == found


def test_every_embedded_work_has_its_notice() -> None:
    notices = (files("voicepass") / "demo/static/vendor/elevenlabs-client/THIRD-PARTY.txt").read_text()

    for work in (
        "livekit-client",
        "@livekit/mutex",
        "@livekit/protocol",
        "@bufbuild/protobuf",
        "webrtc-adapter",
        "events",
        "jose",
        "loglevel",
        "sdp",
        "sdp-transform",
        "typed-emitter",
        "tslib",
    ):
        assert f"\n{work} " in notices, work
    assert "Apache License" in notices
