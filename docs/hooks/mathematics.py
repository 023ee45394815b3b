"""Build hook: turns formulas into MathML, which browsers show without any script.

``$x_i$`` and ``$$...$$`` become marked elements by the arithmatex extension; their LaTeX is
converted once, when the site is built.
"""

import html
import re
from typing import Any

from latex2mathml.converter import convert

INLINE = re.compile(r'<span class="arithmatex">\\\((?P<latex>.+?)\\\)</span>', re.DOTALL)
BLOCK = re.compile(r'<div class="arithmatex">\\\[(?P<latex>.+?)\\\]</div>', re.DOTALL)


def on_page_content(content: str, **_: Any) -> str:
    """The page's HTML with MathML in place of LaTeX."""
    content = BLOCK.sub(lambda found: formula(found["latex"], "block"), content)
    return INLINE.sub(lambda found: formula(found["latex"], "inline"), content)


def formula(escaped: str, display: str) -> str:
    """One formula as MathML; block formulas scroll where the page is narrow."""
    made = str(convert(html.unescape(escaped).strip(), display=display))
    return made if display == "inline" else f'<div class="formula">{made}</div>'
