"""The endpoint's page in a browser: boxes by mouse, finger and keys, what is said, and when it is gone."""

from __future__ import annotations

import base64
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_serve import call, photo, save_tiny, service_of
from test_serve_protocols import running

from hrnet_core.images import encode_png
from serve.routes import make_app
from serve.service import PoseService

PNG = encode_png(photo(0, 400, 300))
SECRET = "0123456789abcdef-page"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("page") / "tiny", 0)


@pytest.fixture(scope="module")
def service(checkpoint: Path) -> PoseService:
    return service_of(checkpoint)


# --- without a browser --------------------------------------------------------------------------


def luminance(color: str) -> float:
    """Relative luminance of #rgb or #rrggbb, as WCAG 2 defines it."""
    digits = color[1:] if len(color) == 7 else "".join(2 * digit for digit in color[1:])
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_have_the_contrast_of_wcag_aa(service: PoseService, scheme: str) -> None:
    css = call(service, "GET", "/page.css").text
    light, dark = re.findall(r":root \{(.*?)\}", css, flags=re.DOTALL)
    colors = dict(re.findall(r"--([\w-]+): (#\w+)", light if scheme == "light" else dark))
    text = ["ink paper", "ink card", "soft paper", "soft card", "blue paper", "on-blue blue", "bad bad-paper"]
    parts = ["edge paper", "edge card", "blue card"]  # borders of fields and buttons, the mark of the focus
    for least, pairs in ((4.5, text), (3.0, parts)):
        for pair in pairs:
            low, high = sorted(luminance(colors[name]) for name in pair.split())
            assert (high + 0.05) / (low + 0.05) >= least, pair


def test_the_page_is_small_and_asks_for_what_is_served(service: PoseService) -> None:
    html = call(service, "GET", "/").text
    files = {"/", *(f"/{name}" for name in re.findall(r'(?:src|href)="([\w.]+\.(?:js|css))"', html))}
    for file in list(files):
        names = re.findall(r'from "\./([\w.]+)"', call(service, "GET", file).text)
        files |= {f"/{name}" for name in names}
    assert files == {"/", "/page.css", "/page.js", "/boxes.js", "/picture.js"}
    answers = [call(service, "GET", file) for file in files]
    assert all(answer.status_code == 200 for answer in answers)
    assert sum(len(answer.content) for answer in answers) < 60_000
    ids = set(re.findall(r'id="(\w+)"', html))
    used = {name for answer in answers for name in re.findall(r'\$\("(\w+)"\)', answer.text)}
    assert used <= ids


# --- with one -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright of the dev extra")
    program = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if program is None:
        pytest.skip(f"no browser here: none of {', '.join(BROWSERS)}")
    with sync_api.sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--no-proxy-server"]
        yield playwright.chromium.launch(executable_path=program, args=arguments)


@pytest.fixture(scope="module")
def url(service: PoseService) -> Iterator[str]:
    with running(make_app(service)) as address:
        yield f"http://{address}/"


def opened(browser: Any, url: str, width: int = 1280, height: int = 900, **options: Any) -> Any:
    """A page; nothing that it does may raise or leave the endpoint."""
    page = browser.new_context(viewport={"width": width, "height": height}, **options).new_page()
    page.on("pageerror", lambda error: page.faults.append(str(error)))
    page.on("request", lambda asked: asked.url.startswith((url, "blob:")) or page.faults.append(asked.url))
    page.faults = []
    # A browser that is told only with the key press to hand a file dialog over may have cancelled it by then.
    page.on("filechooser", lambda _: None)
    page.goto(url)
    page.wait_for_selector("#model b")
    return page


@pytest.fixture
def page(browser: Any, url: str) -> Iterator[Any]:
    page = opened(browser, url)
    yield page
    assert page.faults == []
    page.context.close()


def give(page: Any, data: bytes = PNG) -> None:
    page.set_input_files("#file", {"name": "a.png", "mimeType": "image/png", "buffer": data})
    page.wait_for_selector("#canvas:visible")


def boxes(page: Any) -> list[list[int]]:
    """Of the number fields."""
    values = page.locator("#boxlist input").evaluate_all("fields => fields.map(field => +field.value)")
    return [values[i : i + 4] for i in range(0, len(values), 4)]


def drag(page: Any, start: tuple[float, float], end: tuple[float, float]) -> None:
    """By the mouse, in px of the picture of 400 x 300."""
    frame = page.locator("#canvas").bounding_box()
    for x, y in (start, end):
        page.mouse.move(
            frame["x"] + x * frame["width"] / 400, frame["y"] + y * frame["height"] / 300, steps=3
        )
        page.mouse.down() if (x, y) == start else page.mouse.up()


def click(page: Any, x: float, y: float) -> None:
    width, height = page.evaluate("[canvas.clientWidth, canvas.clientHeight]")
    page.locator("#canvas").click(position={"x": x * width / 400, "y": y * height / 300})


def hand_over(page: Any, kind: str, content: str) -> None:
    """Drop something, or paste it. content: JavaScript that fills a DataTransfer `data`."""
    picture = base64.b64encode(PNG).decode()
    page.evaluate(
        f"""() => {{
            const bytes = Uint8Array.from(atob("{picture}"), (one) => one.charCodeAt(0));
            const file = (name) => new File([bytes], name, {{ type: "image/png" }});
            const data = new DataTransfer();
            {content};
            const event = "{kind}" === "drop" ? new DragEvent("drop", {{ dataTransfer: data, bubbles: true }})
                : new ClipboardEvent("paste", {{ clipboardData: data, bubbles: true }});
            document.body.dispatchEvent(event);
        }}"""
    )


@pytest.mark.slow
def test_boxes_by_the_mouse(page: Any) -> None:
    give(page)
    drag(page, (100, 60), (200, 220))
    assert boxes(page) == [[100, 60, 100, 160]]
    drag(page, (150, 140), (170, 150))
    assert boxes(page) == [[120, 70, 100, 160]], "dragged inside the picked box: moved"
    drag(page, (220, 230), (240, 250))
    assert boxes(page) == [[120, 70, 120, 180]], "by its corner: sized"
    drag(page, (120, 150), (100, 150))
    assert boxes(page) == [[100, 70, 140, 180]], "by its left edge: that edge"
    drag(page, (300, 50), (380, 250))
    assert boxes(page)[1:] == [[300, 50, 80, 200]], "beside it: another one"
    drag(page, (150, 100), (200, 150))
    assert boxes(page)[2:] == [[150, 100, 50, 50]], "inside a box that is not picked: another one"
    click(page, 340, 150)
    assert page.locator("#boxlist [aria-pressed=true]").inner_text() == "2"
    for expected in ("3", "1", "3"):  # the smallest, then what lies under it
        click(page, 175, 125)
        assert page.locator("#boxlist [aria-pressed=true]").inner_text() == expected
    page.locator("#remove").click()
    assert boxes(page) == [[100, 70, 140, 180], [300, 50, 80, 200]]
    click(page, 20, 20)
    assert page.locator("#boxlist [aria-pressed=true]").count() == 0
    assert page.locator("#remove").is_hidden()
    drag(page, (260, 270), (900, 700))
    assert boxes(page)[2:] == [[260, 270, 140, 30]], "a new one, cut at the picture"


@pytest.mark.slow
def test_everything_by_the_keyboard(page: Any) -> None:
    files: list[Any] = [[], {"name": "a.png", "mimeType": "image/png", "buffer": PNG}]
    for pressed, file in zip(("Space", "Enter"), files, strict=True):
        page.locator("#drop").focus()
        with page.expect_file_chooser() as chosen:
            page.keyboard.press(pressed)
        chosen.value.set_files(file)
    page.wait_for_selector("#canvas:visible")
    page.locator("#add").press("Enter")
    assert boxes(page) == [[100, 30, 200, 240]]
    assert page.evaluate("document.activeElement.id") == "canvas"
    page.keyboard.press("Alt+ArrowRight")
    page.keyboard.press("Alt+Shift+ArrowDown")
    assert boxes(page) == [[101, 30, 200, 241]]
    page.keyboard.press("ArrowUp")
    assert boxes(page)[0][1] < 30
    page.keyboard.press("n")
    page.keyboard.press("1")
    assert "Box 1 of 2" in page.locator("#hint").inner_text()
    page.keyboard.press("Delete")
    assert boxes(page) == [[100, 30, 200, 240]]
    page.keyboard.press("Enter")
    page.wait_for_selector("#result:visible")
    page.locator("#table tbody tr").first.focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    assert "right eye" in page.locator("#table tr.on").inner_text()
    assert page.evaluate("document.activeElement.rowIndex") == 3


@pytest.mark.slow
def test_nothing_is_said_of_what_is_not_shown_any_more(page: Any) -> None:
    give(page)
    page.locator("#add").click()
    page.locator("#find").click()
    page.wait_for_selector("#result:visible")
    page.locator("#add").click()
    assert page.locator("#result").is_hidden(), "poses of other boxes"
    page.locator("#boxlist input").nth(2).fill("-5")
    page.locator("#find").click()
    page.wait_for_selector("#problem:visible")
    assert "boxes[0]" in page.locator("#problem").inner_text()
    page.locator("#boxlist input").nth(2).fill("150")
    assert page.locator("#problem").is_hidden()
    held: list[Any] = []
    page.route("**/v1/poses", lambda route: held.append(route))
    page.locator("#find").click()
    page.wait_for_selector("#find:has-text('Looking')")
    page.locator("#canvas").press("ArrowLeft")
    assert page.locator("#find").inner_text() == "Find 2 poses", "asked for boxes that are others now"
    page.unroute("**/v1/poses")
    page.locator("#find").click()
    page.wait_for_selector("#result:visible")
    assert page.locator("#found").inner_text() == "2 people"


@pytest.mark.slow
def test_what_is_dropped_or_pasted_is_answered(page: Any) -> None:
    problem = page.locator("#problem")
    hand_over(page, "drop", 'data.setData("text/uri-list", "https://example.com/a.jpg")')
    page.wait_for_selector("#problem:visible")
    assert "Nothing is fetched" in problem.inner_text()
    hand_over(page, "drop", 'data.items.add(file("one.png")); data.items.add(file("two.png"))')
    page.wait_for_selector("#canvas:visible")
    assert "2 files" in problem.inner_text()
    assert "one.png is shown" in problem.inner_text()
    hand_over(page, "paste", 'data.items.add(file("three.png"))')
    page.wait_for_selector("#problem", state="hidden")
    hand_over(page, "paste", 'data.setData("text/plain", "https://example.com/a.jpg")')
    page.wait_for_selector("#problem:visible")
    page.set_input_files("#file", {"name": "a.txt", "mimeType": "text/plain", "buffer": b"none"})
    page.wait_for_selector("#problem:has-text('a.txt')")
    give(page)
    page.wait_for_selector("#problem", state="hidden")


@pytest.mark.slow
def test_the_key_is_asked_for_and_kept(browser: Any, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(f"page {SECRET}\n")
    with running(make_app(service_of(checkpoint, keys=str(tmp_path / "keys")))) as address:
        page = opened(browser, f"http://{address}/")
        give(page)
        page.locator("#find").click()
        page.wait_for_selector("#keyfield:visible")
        assert page.evaluate("document.activeElement.id") == "key"
        page.keyboard.type("no key of ours, ü")
        page.keyboard.press("Enter")
        assert "no key" in page.locator("#problem").inner_text()
        page.locator("#key").fill("another-key-of-someone")
        page.keyboard.press("Enter")
        page.wait_for_selector("#problem:has-text('request ')")
        assert page.locator("#result").is_hidden()
        page.locator("#key").fill(SECRET)
        page.keyboard.press("Enter")
        page.wait_for_selector("#result:visible")
        assert page.locator("#keyfield").is_hidden()
        assert page.locator("#problem").is_hidden()
        page.reload()
        page.wait_for_selector("#model b")
        give(page)
        page.locator("#find").click()
        page.wait_for_selector("#result:visible")
        assert page.faults == []
        page.context.close()


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
def test_targets_are_44_px_and_nothing_is_wider_than_the_window(browser: Any, url: str, width: int) -> None:
    page = opened(browser, url, width, 844, has_touch=True)
    give(page)
    page.locator("#add").click()
    page.locator("#add").click()
    page.locator("#find").click()
    page.wait_for_selector("#result:visible")
    page.evaluate("for (const one of document.querySelectorAll('details')) one.open = true")
    page.locator("#people button").first.click()
    small = page.evaluate(
        """() => [...document.querySelectorAll('button, input, summary, a, tbody tr')]
            .map(one => [one.outerHTML.slice(0, 80), one.getBoundingClientRect()])
            .filter(([, box]) => box.width && Math.min(box.width, box.height) < 44)
            .map(([text, box]) => `${box.width} x ${box.height} ${text}`)"""
    )
    # Number fields stand side by side, their labels in the summary; rows are tall where fingers point.
    fields = [one for one in small if "number" in one or "<tr" in one]
    assert [one for one in small if one not in fields] == []
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    picture, table = (page.locator(one).bounding_box() for one in ("#canvas", "#table"))
    if width == 1280:
        assert table["x"] > picture["x"] + picture["width"], "beside the picture"
    else:
        page.locator("#table tbody tr").nth(5).scroll_into_view_if_needed()
        assert page.locator("#canvas").bounding_box()["y"] >= 0, "the picture stays with its table"
    page.context.close()


@pytest.mark.slow
def test_numbers_of_boxes_cover_no_face(page: Any) -> None:
    covered = page.evaluate(
        """async () => {
            const { placeNumbers } = await import("./picture.js");
            const hit = ([ax, ay, aw, ah], [bx, by, bw, bh]) =>
                ax < bx + bw && bx < ax + aw && ay < by + bh && by < ay + ah;
            let seed = 1;
            const next = () => (seed = (seed * 16807) % 2147483647) / 2147483647;
            const random = (low, high) => low + (high - low) * next();
            const bad = [];
            for (let i = 0; i < 500; i++) {
                const boxes = Array.from({ length: 1 + (i % 4) }, () => {
                    const w = random(60, 600), h = random(80, 400);
                    return [random(0, 600 - w), random(0, 400 - h), w, h];
                });
                const heads = boxes.map(([x, y, w, h]) => [x + w / 4, y, w / 2, h / 4]);
                const numbers = placeNumbers(boxes, heads, 18, { width: 600, height: 400 });
                const marks = numbers.map(([x, y]) => [x, y, 18, 18]);
                const outside = marks.some(([x, y]) => x < 0 || y < 0 || x > 582 || y > 382);
                const over = marks.some((mark) => heads.some((head) => hit(mark, head)));
                const alike = marks.some((mark, a) => marks.some((other, b) => a < b && hit(mark, other)));
                if (outside || over || alike) bad.push(boxes);
            }
            return bad.length;
        }"""
    )
    assert covered == 0


@pytest.mark.slow
def test_people_found_by_the_detector_are_shown_and_can_be_changed(
    browser: Any, checkpoint: Path, tmp_path: Path
) -> None:
    from test_serve_detector import PNG as red
    from test_serve_detector import crowd
    from test_serve_detector import service_of as with_detector

    with running(make_app(with_detector(checkpoint, crowd(tmp_path)))) as address:
        page = opened(browser, f"http://{address}/")
        assert "people by crowd.onnx" in page.locator("#model").inner_text()
        assert "boxes=" not in page.locator("#curl").text_content()
        give(page, red)
        assert page.locator("#find").inner_text() == "Find the people"
        page.locator("#find").click()
        page.wait_for_selector("#result:visible")
        assert page.locator("#found").inner_text() == "3 people found"
        assert page.locator("#people button").count() == 3
        assert [box[2:] for box in boxes(page)] == [[300, 200]] * 3
        page.locator("#people button").nth(2).click()
        page.locator("#canvas").press("Delete")
        assert page.locator("#result").is_hidden()
        assert page.locator("#find").inner_text() == "Find 2 poses"
        page.locator("#find").click()
        page.wait_for_selector("#result:visible")
        assert page.locator("#found").inner_text() == "2 people"
        page.locator("#clear").click()
        give(page)
        page.locator("#find").click()
        page.wait_for_selector("#result:visible")
        assert page.faults == []
        page.context.close()


@pytest.mark.slow
def test_names_in_the_docs_are_shown_as_code(browser: Any, url: str) -> None:
    page = browser.new_page()
    page.goto(f"{url}docs")
    about = page.locator("section:has-text('POST /v1/poses')").first.locator("h2 + p")
    about.wait_for()
    assert "boxes_from" in about.locator("code").all_inner_texts()
    assert "`" not in about.inner_text()
    page.close()


@pytest.mark.slow
def test_no_status_of_the_docs_is_torn_on_a_phone(browser: Any, url: str) -> None:
    page = browser.new_page(viewport={"width": 360, "height": 800})
    page.goto(f"{url}docs")
    status = page.locator("section:has-text('Problems') td:first-child")
    status.first.wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    lines = "cells => cells.map(({ firstChild: text }) => {"
    lines += (
        "const all = document.createRange(); all.selectNode(text); return all.getClientRects().length; })"
    )
    found = status.evaluate_all(lines)
    assert len(found) > 10
    assert set(found) == {1}
    page.close()


@pytest.mark.slow
@pytest.mark.parametrize("sides", [True, False])
def test_keypoints_of_other_bodies(browser: Any, url: str, sides: bool) -> None:
    """Names of 60 characters leave their numbers in sight; sides are known by L_ and R_; where no name has
    one there is nothing to explain."""
    page = browser.new_page()

    def renamed(route: Any) -> None:
        models = route.fetch().json()
        skeleton = models["models"][0]["skeleton"]
        names = [f"{'a' * 60}{k}" for k in range(len(skeleton["keypoints"]))]
        skeleton["keypoints"] = ["Nose", "L_Eye", "R_Eye", *names[3:]] if sides else names
        route.fulfill(json=models)

    page.route("**/v1/models", renamed)
    page.goto(url)
    give(page)
    page.locator("#find").click()
    page.wait_for_selector("#result:visible")
    legend = page.locator("#legend span:has(.dot)").all_inner_texts()
    assert legend == (["the person's left", "the person's right", "middle"] if sides else [])
    table, around = (page.locator(place).bounding_box() for place in ("#table", "#table >> .."))
    assert table["width"] <= around["width"]
    page.close()
