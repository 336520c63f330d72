"""The drawing of the stream in docs is what the stream does."""

import re
import xml.etree.ElementTree as ElementTree

from stream_drawing import BATCH, CUTS, DRAWING, SAMPLES, SEED, STEP, draw

from fcn_dist.data.stream import SampleStream


def test_the_drawing_in_docs_is_drawn_from_the_stream_as_it_is() -> None:
    assert DRAWING.read_text() == draw(), "draw it again: python tests/stream_drawing.py"
    ElementTree.fromstring(draw())


def test_each_cut_shows_the_samples_of_the_step_in_their_order() -> None:
    cells = [int(number) for number in re.findall(r'y="[\d.]+" class="middle">(\d+)<', draw())]
    stream = SampleStream(range(SAMPLES), SEED)
    batch = [stream.sample(STEP * BATCH + place) for place in range(BATCH)]
    assert cells[:SAMPLES] == list(range(SAMPLES))
    assert sorted(cells[SAMPLES : 2 * SAMPLES]) == sorted(cells[2 * SAMPLES : 3 * SAMPLES]) == list(range(SAMPLES))
    assert cells[3 * SAMPLES :] == batch * len(CUTS)
