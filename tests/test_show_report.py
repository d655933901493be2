"""The report: one page that needs nothing else, whose data is what was given; in a browser where there is one."""

import base64
import json
import re
import shutil
import subprocess
import zlib
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from attnsieve.dam import transform
from attnsieve.errors import UserError
from attnsieve.fingerprint import Fingerprint
from attnsieve.patterns import Captured, Pattern
from attnsieve.plan import Plan
from attnsieve.profiling import Profile
from attnsieve.show import write_report
from attnsieve.show.report import FLOOR, _order, encode_map
from tests.test_show_figures import result_rows

MODEL = Fingerprint("llama", 2, 4, 2, 16, "0" * 16)
L = 19
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def profile() -> Profile:
    maps = torch.rand(2, 4, L, L).pow(4).tril().clamp_min(0)
    maps /= maps.sum(-1, keepdim=True).clamp_min(1e-9)
    return Profile(MODEL, L, maps, torch.full((L,), 2), (), {"data": ["</script><script>alert(1)</script>"]})


def plan() -> Plan:
    corner = (torch.rand(L, L) < 0.4).tril() | torch.eye(L, dtype=torch.bool)
    rules = [
        Pattern.of(Captured.from_mask(corner)) | Pattern.parse(f"columns(0, 3, start={L}) | diagonals(0, 2, 7, start={L})"),
        Pattern.parse("sink(4) | window(30)"),
        Pattern.parse("dilated(9, step=7) | columns(11, 200)"),
        Pattern.parse("random_blocks(2, block=12, seed=3) | window(3)"),
        Pattern.parse("dense()"),
        Pattern.parse("columns(1, 5, start=7) | window(2)"),
        Pattern.parse("sink(2) | window(5) | vertical_slash(mass=0.5)"),
        Pattern.parse("window(1)"),
    ]
    return Plan(MODEL, [rules[:4], rules[4:]], {"settings": {"tau": 0.2}}, torch.rand(2, 4), torch.rand(2, 4))


class Page(HTMLParser):
    """Elements with their attributes and texts; refuses tags that do not match."""

    VOID = frozenset({"meta", "input", "br"})

    def __init__(self, text: str):
        super().__init__()
        self.found, self.open = [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.found.append([tag, dict(attributes), ""])
        if tag not in self.VOID:
            self.open.append(len(self.found) - 1)

    def handle_endtag(self, tag):
        assert self.found[self.open.pop()][0] == tag

    def handle_data(self, text):
        if self.open:
            self.found[self.open[-1]][2] += text


def content_of(path) -> dict:
    (data,) = [text for tag, attributes, text in Page(path.read_text()).found if attributes.get("id") == "data"]
    return json.loads(data)


def blob(content, number, dtype) -> np.ndarray:
    return np.frombuffer(zlib.decompress(base64.b64decode(content["blobs"][number])), dtype)


def bits(content, number) -> np.ndarray:
    return np.unpackbits(blob(content, number, np.uint8), bitorder="little").astype(bool)


def mask_of(content, rule) -> torch.Tensor:
    """bool [tokens, tokens] from the vectors in the page, by the definition that the page's own code follows."""
    n = content["tokens"]
    i, j = np.arange(n)[:, None], np.arange(n)
    kept = i < blob(content, rule["end"], "<i4")
    if rule["offset"] is not None:
        kept = kept | bits(content, rule["offset"])[np.maximum(i - j, 0)]
    if rule["table"] is not None:
        rows, keys = rule["block"]
        across = -(-n // keys)
        kept = kept | bits(content, rule["table"])[(i // rows) * across + j // keys]
    if rule["rows"]:
        corner = bits(content, rule["corner"]).reshape(rule["rows"], -1)[:, : rule["rows"]]
        kept[: rule["rows"]] = False
        kept[: rule["rows"], : rule["rows"]] = corner
    return torch.from_numpy(kept & (j <= i))


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    torch.manual_seed(0)
    given = {"plan": plan(), "profile": profile(), "rows": result_rows()}
    return write_report(tmp_path_factory.mktemp("report") / "deep" / "report.html", heads=[(1, 2)], **given), given


def test_the_page_is_whole_and_refers_to_nothing(report):
    path, _ = report
    text = path.read_text()
    page = Page(text)
    assert [tag for tag, _, _ in page.found].count("script") == 2
    assert not re.search(r"https?:|\bsrc=|\bhref=|url\(|@import|import\(|fetch\(|XMLHttp|WebSocket", text)
    (policy,) = [attributes["content"] for _, attributes, _ in page.found if attributes.get("http-equiv")]
    assert policy.startswith("default-src 'none'")
    assert "{{" not in text
    ids = {attributes.get("id") for _, attributes, _ in page.found}
    (script,) = [text for tag, attributes, text in page.found if tag == "script" and not attributes]
    assert set(re.findall(r'element\("(\w+)"\)', script)) <= ids


def test_the_masks_in_the_page_are_the_plan(report):
    path, given = report
    content = content_of(path)
    position = torch.arange(content["tokens"])
    for layer, row in enumerate(given["plan"].patterns):
        for head, pattern in enumerate(row):
            rule = content["rules"][content["choice"][layer][head]]
            static = Pattern.of(*(atom for atom in pattern if not atom.dynamic))
            assert (rule["text"], rule["dynamic"]) == (str(pattern), pattern.dynamic)
            assert torch.equal(mask_of(content, rule), static.keep(position[:, None], position[None, :]))
    assert content["density"] == given["plan"].density.tolist()
    assert content["boxcox"] == {"lam": 0.5, "eps": 1e-10, "tau": 0.2}
    assert content["kinds"][content["kind"][0][0]]["name"] == "DAM"


def test_the_maps_in_the_page_are_the_profile(report):
    path, given = report
    content = content_of(path)
    assert len(content["maps"]) == 8
    below = np.tril_indices(L)
    for place, number in content["maps"].items():
        layer, head = map(int, place.split(":"))
        codes = blob(content, number, "<u2").astype(float)
        values = np.where(codes == 0, 0, np.exp(np.log(content["floor"]) * (1 - (codes - 1) / 65534)))
        expected = given["profile"].maps[layer, head].numpy()[below]
        np.testing.assert_allclose(values, np.where(expected < FLOOR, 0, expected), rtol=4e-4)
    assert encode_map(torch.eye(2)).tolist() == [65535, 0, 65535]


def test_nothing_in_the_data_becomes_markup(report):
    content = content_of(report[0])
    assert content["provenance"]["profile"]["data"] == ["</script><script>alert(1)</script>"]
    assert content["rows"] == result_rows()
    assert content["first"] == "1:2"


def test_any_beginning_of_the_heads_is_spread_over_the_model():
    model = Fingerprint("llama", 30, 9, 3, 64, "0")
    order = _order(model, None, [(7, 3)])
    assert order[0] == (7, 3)
    assert sorted(order) == [(layer, head) for layer in range(30) for head in range(9)]
    assert len({layer for layer, _ in order[:30]}) > 20
    assert _order(Fingerprint("llama", 1, 1, 1, 64, "0"), None, None) == [(0, 0)]
    with pytest.raises(UserError, match="no layer 30"):
        _order(model, None, [(30, 0)])


def test_what_cannot_be_reported_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"saved as \.html"):
        write_report(tmp_path / "a.htm", rows=result_rows())
    with pytest.raises(UserError, match="give at least one"):
        write_report(tmp_path / "a.html", rows=[])


def dom_of(path, fragment="") -> str:
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    command = [CHROMIUM, *flags, "--virtual-time-budget=20000", "--dump-dom", f"file://{path}#{fragment}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def text_of(dom, name) -> str:
    (text,) = [text for _, attributes, text in Page(dom).found if attributes.get("id") == name]
    return text


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_a_browser_shows_the_values(report):
    path, given = report
    dom = dom_of(path, "head=0:0&cell=12,5&span=8")
    assert 'data-ready="yes"' in dom
    assert "data-error" not in dom
    value = given["profile"].maps[0, 0, 12, 5]
    said = text_of(dom, "cell")
    numbers = re.match(r"query i = 12, key j = 5, distance 7; mean attention (\S+); Box-Cox (\S+); (.*)", said)
    assert float(numbers[1]) == pytest.approx(float(value), rel=1e-3)
    assert float(numbers[2]) == pytest.approx(float(transform(value, 0.5, 1e-10)), rel=1e-3)
    kept = given["plan"].row(0)[0].keep(torch.tensor(12), torch.tensor(5))
    assert numbers[3] == ("kept" if kept else "left out")
    assert dom.count("<canvas") == 6
    assert dom.count("<tr>") == 1 + len(result_rows())
    assert text_of(dom, "count") == "32 of 32 rows"


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_a_browser_shows_rows_alone(tmp_path):
    path = write_report(tmp_path / "rows.html", rows=result_rows())
    hidden = "document.body.dataset.hidden = getComputedStyle(document.querySelector('main')).display"
    path.write_text(path.read_text().replace("</body>", f"<script>{hidden}</script></body>"))
    dom = dom_of(path)
    assert 'data-hidden="none"' in dom
    assert 'data-ready="yes"' in dom
    assert "data-error" not in dom
    assert dom.count("<tr>") == 1 + len(result_rows())


# A user in the page: clicks a head in the grid, turns the wheel, drags, types into the filter, sorts by density.
USER = """
async function act() {
  while (document.body.dataset.ready !== "yes") await new Promise((done) => setTimeout(done, 20));
  const note = (name, value) => (document.body.dataset[name] = value);
  const send = (target, kind, name, at, more) => {
    const box = target.getBoundingClientRect();
    target.dispatchEvent(new kind(name, { clientX: box.left + at[0], clientY: box.top + at[1], bubbles: true, ...more }));
  };
  const { width, height } = gridCell();
  send(element("grid"), MouseEvent, "click", [34 + 0.5 * width, 22 + 1.5 * height]);
  await new Promise((done) => setTimeout(done, 300));
  note("name", element("name").textContent);
  const panel = state.panels[state.panels.length - 1];
  const middle = [MARGIN.left + panel.side / 2, MARGIN.top + panel.side / 2];
  panel.canvas.setPointerCapture = () => undefined;
  note("before", panel.view.span);
  send(panel.canvas, WheelEvent, "wheel", middle, { deltaY: -1 });
  note("after", panel.view.span);
  const { i0, j0 } = panel.view;
  send(panel.canvas, PointerEvent, "pointerdown", middle, { pointerId: 1 });
  send(panel.canvas, PointerEvent, "pointermove", [middle[0] + 10, middle[1] - 20], { pointerId: 1 });
  note("moved", [(panel.view.i0 - i0) / panel.view.span * panel.side, (panel.view.j0 - j0) / panel.view.span * panel.side].join());
  send(panel.canvas, MouseEvent, "dblclick", middle);
  note("all", panel.view.span);
  element("curve-metric").value = "exact_match";
  element("curve-metric").dispatchEvent(new Event("change"));
  send(element("curves"), PointerEvent, "pointermove", [curves.points[0].x, curves.points[0].y]);
  note("point", element("point").textContent);
  note("points", curves.points.length);
  element("filter").value = "KV 1024 exact";
  element("filter").dispatchEvent(new Event("input"));
  note("count", element("count").textContent);
  document.querySelectorAll("th button")[5].click();
  note("order", [...document.querySelectorAll("tbody tr")].map((row) => row.children[5].textContent).join());
}
act().catch(fail);
"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_a_user_can_move_about(report):
    path, _ = report
    acted = path.parent / "acted.html"
    acted.write_text(path.read_text().replace("</body>", f"<script>{USER}</script></body>"))
    (body,) = [attributes for tag, attributes, _ in Page(dom_of(acted)).found if tag == "body"]
    assert "data-error" not in body
    assert body["data-name"] == "Layer 1, head 0"
    assert float(body["data-before"]) == float(body["data-all"]) == 1024
    assert float(body["data-after"]) == pytest.approx(0.8 * 1024)
    assert [float(number) for number in body["data-moved"].split(",")] == pytest.approx([20, -10])
    assert body["data-points"] == "3"
    assert body["data-point"] == "paper: density 3.0 %, exact_match 0.03000 ± 0.050"
    assert body["data-count"] == "4 of 32 rows"
    assert body["data-order"] == "3.0,20,40,100"
