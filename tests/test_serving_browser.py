"""The page in a real browser: images in, masks looked at, files out, held against the predictor."""

import base64
import io
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browsing import CONTRASTS, fresh_browser, requested, show_as, visit
from numpy.typing import NDArray
from PIL import Image
from served import Served, running
from tiny_models import DESCRIPTION, tiny_network

from fcn_dist.deploy.modelfile import write_model_file
from fcn_dist.deploy.predict import Predictor
from fcn_dist.serving.answers import KINDS

pytestmark = pytest.mark.slow

HEIGHT, WIDTH = 120, 180
OPACITY, OUTLINE_LIGHT = 0.6, 0.45
DESKTOP, PHONE = 1200, 360
WAIT = 30
LEAST_CONTRAST = 4.5  # WCAG 2.1, 1.4.3, of text

CANVAS = """
const canvas = document.querySelector(arguments[0]);
if (!canvas.width) return null;
const copy = new OffscreenCanvas(canvas.width, canvas.height).getContext("2d", {willReadFrequently: true});
copy.drawImage(canvas, 0, 0);
const {data} = copy.getImageData(0, 0, canvas.width, canvas.height);
return [canvas.width, canvas.height, btoa(Array.from(data, byte => String.fromCharCode(byte)).join(""))];
"""
REQUESTS = "return performance.getEntriesByType('resource').length"
HOLD = """
const own = window.fetch;
const released = new Promise(resolve => window.release = resolve);
window.fetch = async (url, options) => {
  await Promise.race([released, new Promise(resolve => options.signal.addEventListener("abort", resolve))]);
  return own(url, options);
};
"""
TURN_AWAY_ONCE = """
const own = window.fetch;
window.turnedAway = false;
window.fetch = async () => {
  window.fetch = own;
  window.turnedAway = true;
  return new Response("", {status: 503, headers: {"Retry-After": "300"}});
};
"""
NOTE_DECODED = """
const own = window.createImageBitmap;
window.decoded = [];
window.createImageBitmap = file => (window.decoded.push(file.name), own(file));
"""
FAIL_TO_DRAW_ONCE = """
const all = CanvasRenderingContext2D.prototype, own = all.drawImage;
all.drawImage = () => { all.drawImage = own; throw new Error("no more memory"); };
"""
HAND_OVER = """
const [kind, name, encoded, done] = arguments;
const transfer = new DataTransfer();
transfer.items.add(new File([Uint8Array.from(atob(encoded), one => one.charCodeAt(0))], name, {type: "image/png"}));
const event = kind === "paste" ? new ClipboardEvent(kind, {clipboardData: transfer, bubbles: true})
                               : new DragEvent(kind, {dataTransfer: transfer, bubbles: true, cancelable: true});
document.body.dispatchEvent(event);
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    write_model_file(path, tiny_network().state_dict(), DESCRIPTION, {})
    return path


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with running(model, "--max-bytes", "1MB", folder=tmp_path_factory.mktemp("server")) as served:
        yield served


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with fresh_browser(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three images, which PNG keeps as they are."""
    folder = tmp_path_factory.mktemp("scenes")
    paths = []
    for seed, name in enumerate(["first", "second", "third with a name that is long for the strip"]):
        coarse = np.random.default_rng(seed).integers(0, 256, (HEIGHT // 12, WIDTH // 12, 3), np.uint8)
        paths.append(folder / f"{name}.png")
        Image.fromarray(coarse.repeat(12, axis=0).repeat(12, axis=1)).save(paths[-1])
    return paths


@pytest.fixture(scope="module")
def labels_of(model: Path) -> Callable[[Path], NDArray[np.uint8]]:
    predictor = Predictor.from_file(model, "cpu", "float32")
    return lambda path: predictor.predict(np.asarray(Image.open(path)))


@pytest.fixture
def page(browser: Any, server: Served) -> Iterator[Any]:
    """The page, just loaded. Whatever a test does there, no request leaves the server and no script fails."""
    requested(browser), browser.get_log("browser")
    show_as(browser, "light", DESKTOP)
    visit(browser, server.url)
    until(browser, "return document.getElementById('facts').textContent.includes('5 classes')")
    yield browser
    asked = requested(browser)
    assert asked and all(url.startswith((server.url, f"blob:{server.url}")) for url in asked)
    # That the server refused something is noted by the browser itself.
    assert [entry for entry in browser.get_log("browser") if entry["source"] != "network"] == []


def until(browser: Any, script: str) -> Any:
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, WAIT, 0.05).until(lambda driver: driver.execute_script(script))


def choose(page: Any, *paths: Path) -> None:
    """Pick files as with the button, and wait until all in the strip are labelled or refused."""
    before = page.execute_script("return document.querySelectorAll('#strip li').length")
    page.find_element("id", "files").send_keys("\n".join(map(str, paths)))
    settled(page, before + len(paths))


@contextmanager
def held(page: Any) -> Iterator[None]:
    """Nothing is sent to be labelled before this ends."""
    page.execute_script(HOLD)
    yield
    page.execute_script("window.release()")


def settled(page: Any, count: int) -> None:
    until(page, f"return document.querySelectorAll('#strip .done, #strip .failed').length === {count}")


def canvas(page: Any, selector: str) -> NDArray[np.uint8] | None:
    """RGBA of a canvas."""
    found = page.execute_script(CANVAS, selector)
    if found is None:
        return None
    width, height, encoded = found
    return np.frombuffer(base64.b64decode(encoded), np.uint8).reshape(height, width, 4)


def pixels(path: Path) -> NDArray[np.uint8]:
    """RGBA of an image file, as a viewer shows it on white."""
    image = Image.open(path).convert("RGBA")
    return np.asarray(Image.alpha_composite(Image.new("RGBA", image.size, "white"), image))


def shows(page: Any, selector: str, wanted: NDArray[np.uint8]) -> bool:
    found = canvas(page, selector)
    return found is not None and np.array_equal(found, wanted)


def outlines(labels: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Of labels that are all above 0."""
    padded = np.pad(labels, 1, mode="edge")
    found: NDArray[np.bool_] = (padded[:-2, 1:-1] != labels) | (padded[1:-1, :-2] != labels)
    return found


def coloured(labels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    table = np.array([(0, 0, 0), *DESCRIPTION.colours])
    colours = table[labels]
    darker = np.floor(colours * OUTLINE_LIGHT + 0.5)  # halves up, as JavaScript rounds
    return np.where(outlines(labels)[..., None], darker, colours).astype(np.uint8)


def click(page: Any, selector: str, number: int = 0) -> None:
    page.find_elements("css selector", selector)[number].click()


def legend(page: Any) -> list[str]:
    return [one.text.replace("\n", " ") for one in page.find_elements("css selector", "#legend button")]


def move_to(page: Any, x: int, y: int, clicks: bool = False) -> None:
    """The pointer to that pixel of the image."""
    from selenium.webdriver import ActionChains

    box = page.execute_script(
        "const b = document.getElementById('stage').getBoundingClientRect();return [b.left, b.top, b.width, b.height]"
    )
    stage = page.find_element("id", "stage")
    right = round((x + 0.5) * box[2] / WIDTH - box[2] / 2)
    down = round((y + 0.5) * box[3] / HEIGHT - box[3] / 2)
    chain = ActionChains(page, duration=0).move_to_element_with_offset(stage, right, down)
    (chain.click() if clicks else chain).perform()


def test_an_image_that_is_chosen_is_seen_with_its_mask(
    page: Any, scenes: list[Path], labels_of: Callable[[Path], NDArray[np.uint8]]
) -> None:
    assert not page.find_element("id", "bench").is_displayed()
    choose(page, scenes[0])
    image, mask = canvas(page, "#image"), canvas(page, "#mask")
    assert image is not None and (image[..., :3] == np.asarray(Image.open(scenes[0]))).all()
    labels = labels_of(scenes[0])
    assert mask is not None and (mask[..., :3] == coloured(labels)).all() and (mask[..., 3] == 255).all()
    counts = sorted(((labels == label).sum(), DESCRIPTION.classes[label - 1]) for label in np.unique(labels))[::-1]
    assert [line.split()[0] for line in legend(page)] == [name for _, name in counts]
    assert legend(page)[0] == f"{counts[0][1]} {100 * counts[0][0] / labels.size:.1f} %"
    assert page.find_element("id", "stage").get_attribute("aria-label").startswith(f"first.png: {counts[0][1]} ")
    assert page.find_element("id", "status").get_attribute("textContent").startswith("first.png, ")


@pytest.mark.parametrize("kind", ["drop", "paste"])
def test_images_come_in_by_other_ways_too(
    page: Any, scenes: list[Path], labels_of: Callable[[Path], NDArray[np.uint8]], kind: str
) -> None:
    page.execute_script(HAND_OVER, kind, "handed.png", base64.b64encode(scenes[1].read_bytes()).decode())
    settled(page, 1)
    mask = canvas(page, "#mask")
    assert mask is not None and (mask[..., :3] == coloured(labels_of(scenes[1]))).all()


def test_the_pointer_names_the_class_under_it_and_its_share(
    page: Any, scenes: list[Path], labels_of: Callable[[Path], NDArray[np.uint8]]
) -> None:
    choose(page, scenes[0])
    labels = labels_of(scenes[0])
    seen = set()
    for y in range(7, HEIGHT, 25):
        for x in range(5, WIDTH, 33):
            move_to(page, x, y)
            # A pixel of the image is several of the screen; which is hit is rounded.
            near = np.unique(labels[y - 1 : y + 2, x - 1 : x + 2])
            if len(near) == 1:
                share = (labels == near[0]).mean()
                assert page.find_element("id", "tip").text == f"{DESCRIPTION.classes[near[0] - 1]} {100 * share:.1f} %"
                marked = page.execute_script(
                    "return [...document.querySelectorAll('.under')].map(b => b.dataset.label)"
                )
                assert marked == [str(near[0])]
                seen.add(near[0])
    assert len(seen) > 2


def test_a_click_shows_one_class_alone_until_the_next_or_escape(
    page: Any, scenes: list[Path], labels_of: Callable[[Path], NDArray[np.uint8]]
) -> None:
    choose(page, scenes[0])
    labels = labels_of(scenes[0])
    requests = page.execute_script(REQUESTS)
    whole = canvas(page, "#mask")
    y, x = next(
        (y, x) for y in range(9, HEIGHT) for x in range(9, WIDTH) if np.ptp(labels[y - 3 : y + 4, x - 3 : x + 4]) == 0
    )

    def alone() -> set[int] | None:
        """Labels that bear colours; None if all do."""
        mask = canvas(page, "#mask")
        assert mask is not None and whole is not None
        bright = mask[..., 3] == 255
        assert (mask[bright] == whole[bright]).all()
        return None if bright.all() else {int(label) for label in np.unique(labels[bright])}

    def pressed() -> Any:
        script = "return [...document.querySelectorAll('[aria-pressed=true]')].map(b => b.dataset.label)"
        return page.execute_script(script)

    label = int(labels[y, x])
    move_to(page, x, y, clicks=True)
    assert alone() == {label} and pressed() == [str(label)]
    move_to(page, x, y, clicks=True)
    assert alone() is None and pressed() == []
    entries = page.find_elements("css selector", "#legend button")
    entries[-1].click()
    smallest = int(entries[-1].get_attribute("data-label"))
    assert alone() == {smallest}
    entries[0].send_keys("\ue00c")  # escape
    assert alone() is None
    entries[0].send_keys("\ue007")  # enter
    assert alone() == {int(entries[0].get_attribute("data-label"))}
    assert page.execute_script(REQUESTS) == requests > 0


def test_the_slider_changes_how_much_of_the_image_is_seen(page: Any, scenes: list[Path]) -> None:
    choose(page, scenes[0])
    slider = page.find_element("id", "opacity")
    before = screenshot(page)
    slider.send_keys("\ue010")  # end: 100
    assert page.find_element("id", "percent").text == "100 %"
    full = screenshot(page)
    slider.send_keys("\ue011")  # home: 0
    none = screenshot(page)
    image = np.asarray(Image.open(scenes[0]).resize((none.shape[1], none.shape[0]), Image.Resampling.NEAREST))
    inside = (slice(20, -20), slice(20, -20))
    errors = [np.abs(shot[inside].astype(int) - image[inside]).mean() for shot in (none, before, full)]
    assert errors[0] < 8 and errors[0] < errors[1] < errors[2]
    # The arrow keys are the slider's while it has the focus, and the images' otherwise.
    slider.send_keys("\ue014")
    assert page.find_element("id", "percent").text == "1 %"


def screenshot(page: Any) -> NDArray[np.uint8]:
    """The stage as it is seen."""
    png = page.find_element("id", "stage").screenshot_as_png
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def test_downloads_are_what_the_predictor_gives(
    page: Any, scenes: list[Path], labels_of: Callable[[Path], NDArray[np.uint8]], tmp_path: Path
) -> None:
    page.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})
    choose(page, scenes[0])
    labels, image = labels_of(scenes[0]), np.asarray(Image.open(scenes[0]))
    for number in range(3):
        click(page, ".row button", number)
    names = {"first_overlay.png", "first_labels.png", "first.json"}
    wait_for(page, lambda: {path.name for path in tmp_path.iterdir()} == names)
    saved = Image.open(tmp_path / "first_labels.png")
    assert saved.mode == "L" and (np.asarray(saved) == labels).all()
    wanted = (1 - OPACITY) * image + OPACITY * coloured(labels)
    overlay = np.asarray(Image.open(tmp_path / "first_overlay.png").convert("RGB"))
    assert np.abs(overlay - wanted).max() < 3  # canvases round twice
    found = json.loads((tmp_path / "first.json").read_text())
    assert (found["image"], found["width"], found["height"]) == ("first.png", WIDTH, HEIGHT)
    assert found["model"] == "tiny.safetensors"
    assert {one["label"]: one["pixels"] for one in found["classes"]} == dict(
        zip(*(part.tolist() for part in np.unique(labels, return_counts=True)), strict=True)
    )
    assert all(one["name"] == DESCRIPTION.classes[one["label"] - 1] for one in found["classes"])
    assert all(one["share"] == pytest.approx(one["pixels"] / labels.size) for one in found["classes"])


def wait_for(page: Any, condition: Callable[[], bool]) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(page, WAIT, 0.05).until(lambda _: condition())


def test_what_is_no_image_is_said_and_the_others_are_labelled(page: Any, scenes: list[Path], tmp_path: Path) -> None:
    (tmp_path / "notes.png").write_text("no image")
    (tmp_path / "half.png").write_bytes(scenes[0].read_bytes()[:200])
    (tmp_path / "large.png").write_bytes(bytes(1_000_001))
    choose(page, tmp_path / "notes.png", scenes[0], tmp_path / "half.png", tmp_path / "large.png")
    message = page.find_element("id", "message")
    assert message.is_displayed() and message.get_attribute("role") == "alert"
    assert message.text.startswith("notes.png cannot be decoded")
    assert not page.find_element("id", "stage").is_displayed()
    click(page, "#strip button", 1)
    assert not message.is_displayed() and canvas(page, "#mask") is not None
    click(page, "#strip button", 2)
    assert message.text.startswith("half.png cannot be decoded")
    click(page, "#strip button", 3)
    assert "large.png" in message.text and "1000001" in message.text


def test_an_image_that_no_browser_shows_has_its_mask_shown(
    page: Any, scenes: list[Path], labels_of: Callable[[Path], NDArray[np.uint8]], tmp_path: Path
) -> None:
    Image.open(scenes[0]).save(tmp_path / "scene.tif")
    choose(page, tmp_path / "scene.tif")
    mask = canvas(page, "#mask")
    assert mask is not None and (mask[..., :3] == coloured(labels_of(scenes[0]))).all()
    assert "cannot show the image itself" in page.find_element("id", "message").text
    thumbnail = canvas(page, "#strip canvas")
    assert thumbnail is not None and mask.shape[0] == thumbnail.shape[0]
    beside = (mask.shape[1] - thumbnail.shape[1]) // 2
    assert (thumbnail == mask[:, beside:-beside]).all()


def test_an_image_that_waits_is_shown_itself_without_a_mask(page: Any, scenes: list[Path], tmp_path: Path) -> None:
    Image.open(scenes[0]).save(tmp_path / "scene.tif")
    paths = [*scenes, tmp_path / "scene.tif"]
    page.execute_script(NOTE_DECODED)
    choose(page, paths[0])
    busy = page.find_element("id", "busy")
    with held(page):
        page.find_element("id", "files").send_keys("\n".join(map(str, paths[1:])))
        for number, words in [(2, "waiting …"), (1, "labelling …"), (2, "waiting …")]:
            click(page, "#strip button", number)
            wait_for(page, partial(shows, page, "#image", pixels(paths[number])))
            assert canvas(page, "#mask") is None and legend(page) == [] and busy.text == words
        click(page, "#strip button", 3)
        assert canvas(page, "#image") is canvas(page, "#mask") is None and busy.text == "waiting …"
        click(page, "#strip button", 0)
        assert shows(page, "#image", pixels(paths[0])) and canvas(page, "#mask") is not None
        assert not busy.is_displayed()
    settled(page, len(paths))
    click(page, "#strip button", 2)
    assert shows(page, "#image", pixels(paths[2])) and canvas(page, "#mask") is not None
    decoded = page.execute_script("return window.decoded")
    assert sorted(decoded) == sorted(path.name for path in paths)


def test_an_image_that_is_removed_while_it_is_labelled_does_not_keep_the_others_waiting(
    page: Any, scenes: list[Path]
) -> None:
    with held(page):
        page.find_element("id", "files").send_keys("\n".join(map(str, scenes[:2])))
        until(page, "return document.querySelector('#strip .busy')?.title === 'first.png'")
        wait_for(page, lambda: shows(page, "#image", pixels(scenes[0])))
        click(page, "#remove")
        until(page, "return document.querySelector('#strip .busy')?.title === 'second.png'")
    settled(page, 1)
    assert shows(page, "#image", pixels(scenes[1])) and canvas(page, "#mask") is not None
    assert not page.find_element("id", "message").is_displayed()
    choose(page, scenes[2])


def test_an_image_that_is_removed_while_the_server_has_no_room_does_not_keep_the_others_waiting(
    page: Any, scenes: list[Path]
) -> None:
    page.execute_script(TURN_AWAY_ONCE)
    page.find_element("id", "files").send_keys("\n".join(map(str, scenes[:2])))
    until(page, "return window.turnedAway")
    click(page, "#remove")
    settled(page, 1)
    assert shows(page, "#image", pixels(scenes[1])) and canvas(page, "#mask") is not None


def test_whatever_fails_for_one_image_the_others_are_labelled(page: Any, scenes: list[Path]) -> None:
    page.execute_script(FAIL_TO_DRAW_ONCE)
    choose(page, *scenes)
    assert page.find_element("id", "message").text == "no more memory"
    assert len(page.find_elements("css selector", "#strip .done")) == 2


@pytest.mark.parametrize("width", [DESKTOP, PHONE])
def test_an_image_that_failed_can_be_removed(page: Any, scenes: list[Path], width: int, tmp_path: Path) -> None:
    show_as(page, "light", width)
    (tmp_path / "notes.png").write_text("no image")
    choose(page, tmp_path / "notes.png", scenes[0])
    page.find_elements("css selector", "#strip button")[1].send_keys("\ue004")  # tab
    focused = page.switch_to.active_element
    assert focused.get_attribute("id") == "remove" and focused.is_displayed()
    assert focused.size["height"] >= (44 if width == PHONE else 24)  # WCAG 2.1, 2.5.5, and 2.2, 2.5.8
    focused.send_keys("\ue007")  # enter
    assert [one.text for one in page.find_elements("css selector", "#strip li")] == ["first.png"]
    assert not page.find_element("id", "message").is_displayed() and canvas(page, "#mask") is not None
    click(page, "#remove")
    assert page.find_elements("css selector", "#strip li") == []
    assert not page.find_element("id", "remove").is_displayed()


def test_the_delete_key_removes_an_image_except_from_the_slider(page: Any, scenes: list[Path], tmp_path: Path) -> None:
    (tmp_path / "notes.png").write_text("no image")
    choose(page, scenes[0], tmp_path / "notes.png")
    delete = "\ue017"

    def left() -> list[str]:
        return [one.get_attribute("title") for one in page.find_elements("css selector", "#strip button")]

    page.find_element("id", "opacity").send_keys(delete)
    assert left() == ["first.png", "notes.png"]
    click(page, "#strip button", 1)
    page.switch_to.active_element.send_keys(delete)
    assert left() == ["first.png"] and page.switch_to.active_element.get_attribute("title") == "first.png"
    body = page.find_element("css selector", "body")
    body.send_keys(delete)
    assert left() == []
    body.send_keys(delete)
    choose(page, scenes[1])


def test_the_file_picker_offers_the_kinds_that_the_server_takes(page: Any) -> None:
    kinds = Image.registered_extensions()
    kinds |= {Image.MIME[kind]: kind for kind in KINDS}
    offered = page.find_element("id", "files").get_attribute("accept").split(",")
    assert {kinds.get(one, one) for one in offered} == set(KINDS)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_what_is_transparent_is_seen_on_white(page: Any, scenes: list[Path], theme: str, tmp_path: Path) -> None:
    show_as(page, theme, DESKTOP)
    picture = Image.open(scenes[0])
    picture.putalpha(Image.linear_gradient("L").resize(picture.size).point(lambda alpha: alpha // 64 * 85))
    picture.save(tmp_path / "clear.png")
    wanted = pixels(tmp_path / "clear.png").astype(int)
    page.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})
    choose(page, tmp_path / "clear.png")
    image, mask, thumbnail = (canvas(page, selector) for selector in ("#image", "#mask", "#strip canvas"))
    assert image is not None and mask is not None and thumbnail is not None
    beside = (WIDTH - thumbnail.shape[1]) // 2
    for found, part in [(image, wanted), (thumbnail, wanted[:, beside:-beside])]:
        assert (found[..., 3] == 255).all() and np.abs(found - part).max() < 3
    click(page, "#save-overlay")
    overlay_path = tmp_path / "clear_overlay.png"
    wait_for(page, overlay_path.exists)
    overlay = np.asarray(Image.open(overlay_path).convert("RGBA"))
    assert np.abs(overlay - ((1 - OPACITY) * wanted + OPACITY * mask)).max() < 3


def test_several_images_are_gone_through_by_keys(
    page: Any, scenes: list[Path], labels_of: Callable[[Path], NDArray[np.uint8]]
) -> None:
    choose(page, *scenes)

    def shown() -> str:
        current = page.find_elements("css selector", "#strip [aria-current=true]")
        mask = canvas(page, "#mask")
        assert len(current) == 1 and mask is not None
        name = current[0].get_attribute("title")
        path = next(path for path in scenes if path.name == name)
        assert (mask[..., :3] == coloured(labels_of(path))).all()
        return path.stem.split()[0]

    body = page.find_element("css selector", "body")
    assert shown() == "first"
    for key, wanted in [("\ue014", "second"), ("\ue014", "third"), ("\ue014", "third"), ("\ue012", "second")]:
        body.send_keys(key)
        assert shown() == wanted
    click(page, "#strip button", 0)
    page.switch_to.active_element.send_keys("\ue014")
    assert shown() == "second" and page.switch_to.active_element.get_attribute("title") == "second.png"
    outline = page.execute_script("return getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    click(page, "#remove")
    assert len(page.find_elements("css selector", "#strip li")) == 2 and shown() == "third"


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [DESKTOP, PHONE])
def test_everything_fits_and_can_be_read(page: Any, scenes: list[Path], width: int, theme: str, tmp_path: Path) -> None:
    show_as(page, theme, width)
    (tmp_path / "notes.png").write_text("no image")
    for path in (None, tmp_path / "notes.png", scenes[2]):
        if path:
            choose(page, path)
        assert page.execute_script("return document.documentElement.scrollWidth") <= width
        found = page.execute_script(CONTRASTS)
        assert len(found) > 5 and [one for one in found if one[0] < LEAST_CONTRAST] == []
    stage = page.find_element("id", "stage").size
    assert stage["width"] > 0.6 * min(width, 700) and stage["width"] / stage["height"] == pytest.approx(
        WIDTH / HEIGHT, abs=0.02
    )
    visit(page, page.current_url + "docs")
    assert page.execute_script("return document.documentElement.scrollWidth") <= width
    assert [one for one in page.execute_script(CONTRASTS) if one[0] < LEAST_CONTRAST] == []
    grounds = {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 27)"}
    assert page.execute_script("return getComputedStyle(document.body).backgroundColor") == grounds[theme]
