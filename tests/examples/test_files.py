"""Rules that the files of every example must follow."""

import json
import re

from tests.examples.conftest import CLIENT, EXAMPLES
from voicepass import errors

PAGES = {"plain-html": "", "vite-react": "src", "nextjs": "app"}
SENTENCES = (EXAMPLES / "plain-html" / "sentences.js").read_text()
OPERATORS_WORDS = re.compile(
    r"elevenlabs|voicepass|\bpass|token|quota|variable|agent|override|operator|key\b", re.IGNORECASE
)
PAIRS = [
    *(("ink", under) for under in ("page", "card", "well", "tint")),
    *(("soft", under) for under in ("page", "card", "well")),
    *(("accent", "card"), ("stop", "card"), ("stop", "well"), ("on-accent", "accent"), ("on-accent", "accent-strong")),
]


def test_the_examples_share_the_same_files() -> None:
    for name in ("sentences.js", "minutes.js", "shop.css"):
        assert len({(EXAMPLES / page / folder / name).read_text() for page, folder in PAGES.items()}) == 1, name
    react, next_js = EXAMPLES / "vite-react" / "src", EXAMPLES / "nextjs" / "app"
    for name in ("useVoice.ts", "useMinutes.ts", "Assistant.tsx"):
        assert (next_js / name).read_text().removeprefix('"use client";\n\n') == (react / name).read_text(), name


def test_every_package_is_pinned_and_no_lock_file_names_a_registry() -> None:
    for example in ("vite-react", "nextjs"):
        package = json.loads((EXAMPLES / example / "package.json").read_text())
        versions = (package["dependencies"] | package["devDependencies"]).values()
        assert all(re.fullmatch(r"\d+\.\d+\.\d+(-beta\.\d+)?", version) for version in versions), example
        assert not list((EXAMPLES / example).glob("*lock*"))


def test_the_first_page_lists_every_example() -> None:
    listed = re.findall(r"^\| \[([\w-]+)\]", (EXAMPLES / "README.md").read_text(), re.MULTILINE)

    assert set(listed) == {folder.name for folder in EXAMPLES.iterdir() if folder.is_dir() and folder.name[0].isalpha()}


def test_every_readme_is_short_and_its_links_have_targets() -> None:
    for example in (*PAGES, "compose"):
        text = (EXAMPLES / example / "README.md").read_text()
        assert len(text.split()) <= 120, example
        assert all((EXAMPLES / example / link).exists() for link in re.findall(r"\]\(([^)#]+)", text)), example


def test_every_cause_has_a_sentence_for_a_shopper() -> None:
    union = re.search(r"export type Cause =\n(.*?);", (CLIENT / "client.d.ts").read_text(), re.DOTALL)
    assert union is not None
    by_cause = SENTENCES.partition("BY_CAUSE = {")[2].partition("};")[0]
    by_code = SENTENCES.partition("BY_CODE = {")[2].partition("};")[0]
    codes = {refusal.code for refusal in vars(errors).values() if hasattr(refusal, "code")}

    assert set(re.findall(r"^  (\w+): ", by_cause, re.MULTILINE)) == set(re.findall(r'"(\w+)"', union[1]))
    assert set(re.findall(r"^  (\w+): ", by_code, re.MULTILINE)) <= codes | {"not_signed_in", "unreachable"}
    sentences = re.findall(r'"([A-Z][^"]+)"', SENTENCES)
    assert len(sentences) > 20
    assert [sentence for sentence in sentences if OPERATORS_WORDS.search(sentence)] == []


def compute_luminance(color: str) -> float:
    channels = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_every_text_has_enough_contrast_in_light_and_in_dark_mode() -> None:
    css = (EXAMPLES / "plain-html" / "shop.css").read_text()
    light, dark = (
        dict(re.findall(r"--([\w-]+): (#\w{6});", block)) for block in re.findall(r":root \{.*?\}", css, re.DOTALL)
    )

    assert light.keys() == dark.keys()
    for colors in (light, dark):
        for text, under in PAIRS:
            darker, lighter = sorted((compute_luminance(colors[text]), compute_luminance(colors[under])))
            assert (lighter + 0.05) / (darker + 0.05) >= 4.5, (text, under, colors[text])
