"""The page works with a keyboard, with a screen reader, on small screens and in dark mode."""

import pytest
from playwright.sync_api import Page, Response, expect

from tests.browser.conftest import Demo, OpenDemo

pytestmark = [pytest.mark.browser, pytest.mark.long]

# Compares every visible text with the first opaque background below it.
_POOR_CONTRAST = """() => {
  const rgb = (color) => color.match(/[\\d.]+/g).map(Number);
  const luminance = (color) => rgb(color).slice(0, 3).map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const beneath = (node) => {
    for (let at = node; at; at = at.parentElement) {
      const [, , , alpha = 1] = rgb(getComputedStyle(at).backgroundColor);
      if (alpha === 1) return getComputedStyle(at).backgroundColor;
    }
    return 'rgb(255, 255, 255)';
  };
  const poor = [];
  let seen = 0;
  for (const node of document.body.querySelectorAll('*')) {
    const drawn = [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
    if (!drawn || !node.checkVisibility()) continue;
    const { color, fontSize } = getComputedStyle(node);
    const [light, dark] = [luminance(color), luminance(beneath(node))].sort((a, b) => b - a);
    const ratio = (light + 0.05) / (dark + 0.05);
    seen += 1;
    if (ratio < (parseFloat(fontSize) >= 24 ? 3 : 4.5)) poor.push(`${ratio.toFixed(2)} ${node.textContent.trim()}`);
  }
  return seen > 20 ? poor : [`only ${seen} texts were looked at`];
}"""

_FOCUSED = """() => {
  const at = document.activeElement;
  const ring = at.matches('[type=radio]') ? at.nextElementSibling : at;
  return [at.labels?.[0]?.innerText ?? at.innerText, getComputedStyle(ring).outlineStyle];
}"""


def _try_without_a_pass(demo: Demo) -> None:
    demo.button("Try without a pass").click()
    demo.page.get_by_text("The server closes it at once").wait_for()
    demo.wait(1)
    demo.page.get_by_text("WebSocket is already in").wait_for()


def _tab_to(page: Page, name: str, *, key: str = "Tab") -> None:
    for _ in range(20):
        page.keyboard.press(key)
        focused, ring = page.evaluate(_FOCUSED)
        assert ring != "none", f"no focus ring on {focused}"
        if focused == name:
            return
    raise AssertionError(f"the key {key} never focused {name}")


def test_the_whole_journey_works_by_keyboard_alone(demo: Demo) -> None:
    keyboard = demo.page.keyboard

    assert demo.page.evaluate(_FOCUSED)[0] == "Your name"
    keyboard.type("Ada")
    keyboard.press("Enter")
    expect(demo.button("Start conversation")).to_be_focused()
    keyboard.press("Enter")
    expect(demo.message).to_be_focused()
    keyboard.type("I want to sell eggs for 2 dollars each")
    keyboard.press("Enter")
    expect(demo.products).to_contain_text("eggs")
    _tab_to(demo.page, "End conversation", key="Shift+Tab")
    keyboard.press("Enter")

    expect(demo.status).to_contain_text("Disconnected 1000")
    expect(demo.button("Start conversation")).to_be_focused()


def test_every_part_of_the_page_has_its_role_and_name(shared_demo: Demo) -> None:
    expect(shared_demo.page.get_by_role("main")).to_match_aria_snapshot(
        """
        - heading "One sign-in, one pass, one conversation." [level=1]
        - list "Progress":
          - listitem: Sign in
          - listitem: "Start: get a pass"
          - listitem: Talk
        - region "Sign in":
          - heading "Sign in" [level=2]
          - textbox "Your name"
          - button "Sign in"
        - region "Conversation":
          - heading "Conversation" [level=2]
          - group "Mode":
            - radio "Text" [checked]
            - radio "Voice"
          - button "Start conversation" [disabled]
          - status:
            - strong: Not connected
          - log "Transcript"
          - textbox "Message" [disabled]
          - button "Send" [disabled]
          - group "Suggestions":
            - button "I want to sell eggs for 2 dollars each" [disabled]
            - button "Hello" [disabled]
            - button "Goodbye" [disabled]
          - group: Try a broken pass
        - region "Pass":
          - heading "Pass" [level=2]
        - region "Products":
          - heading "Products" [level=2]
        - region "Before / After":
          - heading "Before / After" [level=2]
          - article "Before":
            - heading "Before" [level=3]
            - button "Try without a pass"
          - article "After":
            - heading "After" [level=3]
            - button "Try with a pass"
        - region "Use this in your app":
          - heading "Use this in your app" [level=2]
          - button "Copy these lines"
        """
    )


def test_every_control_has_a_name_and_every_reference_a_target(shared_demo: Demo) -> None:
    flaws = shared_demo.page.evaluate(
        """() => {
          const nameless = [...document.querySelectorAll('input, select, button')]
            .filter((node) => !(node.labels?.length || node.textContent.trim() || node.ariaLabel));
          const pointing = document.querySelectorAll('[for], [aria-labelledby], [aria-describedby]');
          const dangling = [...pointing].filter((node) => ['for', 'aria-labelledby', 'aria-describedby'].some((name) =>
              node.getAttribute(name)?.split(' ').some((id) => !document.getElementById(id))));
          const ids = [...document.querySelectorAll('[id]')].map((node) => node.id);
          const levels = [...document.querySelectorAll('h1, h2, h3, h4')].map((node) => Number(node.tagName[1]));
          return {
            nameless: nameless.map((node) => node.outerHTML),
            dangling: dangling.map((node) => node.outerHTML),
            twice: ids.filter((id, at) => ids.indexOf(id) !== at),
            skipped: levels.filter((level, at) => level > (levels[at - 1] ?? 0) + 1),
          };
        }"""
    )

    assert flaws == {"nameless": [], "dangling": [], "twice": [], "skipped": []}


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_every_text_has_enough_contrast_in_every_state(open_demo: OpenDemo, *, dark: bool) -> None:
    demo = open_demo(dark=dark, own_time=True)
    assert demo.page.evaluate(_POOR_CONTRAST) == []

    demo.sign_in()
    demo.break_the_pass("None, a good pass")
    demo.start()
    demo.say("I want to sell eggs for 2 dollars each")
    expect(demo.products).to_contain_text("eggs")
    _try_without_a_pass(demo)
    assert demo.page.evaluate(_POOR_CONTRAST) == []

    demo.button("End conversation").click()
    demo.break_the_pass("Tampered with")
    demo.button("Start conversation").click()
    expect(demo.status).to_contain_text("3000")
    assert demo.page.evaluate(_POOR_CONTRAST) == []


def test_a_narrow_screen_never_scrolls_sideways(open_demo: OpenDemo) -> None:
    demo = open_demo(width=360, own_time=True)
    sideways = "() => document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert demo.page.evaluate(sideways) == 0

    demo.sign_in("A name that goes on without a single space: " + "n" * 16)
    demo.start()
    demo.say("x" * 200)
    _try_without_a_pass(demo)

    assert demo.page.evaluate(sideways) == 0


def test_the_page_works_under_a_strict_content_security_policy(shared_demo: Demo) -> None:
    response = shared_demo.page.reload()
    assert isinstance(response, Response)

    policy = response.headers["content-security-policy"]

    assert "default-src 'none'" in policy
    assert "script-src 'self';" in policy
    assert "style-src 'self';" in policy
    assert "unsafe" not in policy
    assert shared_demo.console == []
