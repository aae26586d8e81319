"""How a page must look at any width and in either color scheme: nothing cut off, nothing hard to read."""

from tests.browser.chromium import Browser

CUT = """
[...document.querySelectorAll('body *')].filter(element => {
  if (!element.checkVisibility() || element.closest('svg')) return false;
  // For readers of the screen only.
  for (let e = element; e; e = e.parentElement) if (getComputedStyle(e).clipPath !== 'none') return false;
  const box = element.getBoundingClientRect(), style = getComputedStyle(element);
  if (!box.width || !box.height) return false;
  // What is wider than its own box and cannot be scrolled is cut.
  const whole = style.textOverflow === 'ellipsis' && element.title;
  if (element.scrollWidth > element.clientWidth + 1 && style.overflowX === 'hidden' && !whole) return true;
  for (let parent = element.parentElement; parent; parent = parent.parentElement) {
    const around = getComputedStyle(parent);
    if (['auto', 'scroll'].includes(around.overflowX) || (around.textOverflow === 'ellipsis' && parent.title)) return false;
  }
  return box.right > innerWidth + 1 || box.left < -1;
}).map(element => element.outerHTML.slice(0, 100))
"""

FAINT = """
(() => {
  const parse = color => { const n = color.match(/[\\d.]+/g).map(Number); return [n[0], n[1], n[2], n[3] ?? 1]; };
  const over = (top, below) => [0, 1, 2].map(i => top[i] * top[3] + below[i] * (1 - top[3])).concat(1);
  const light = c => c.slice(0, 3).map(v => v / 255).map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const found = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !element.checkVisibility() || element.closest('svg title')) continue;
    const layers = [];
    for (let e = element; e; e = e.parentElement) layers.unshift(parse(getComputedStyle(e).backgroundColor));
    const back = layers.reduce((below, top) => over(top, below), [255, 255, 255, 1]);
    const ink = over(parse(getComputedStyle(element).color), back);
    const [high, low] = [light(ink), light(back)].sort((a, b) => b - a);
    const ratio = (high + .05) / (low + .05);
    if (ratio < 4.5) found.push(ratio.toFixed(2) + ': ' + walker.currentNode.data.trim().slice(0, 60));
  }
  return found;
})()
"""


async def check_looks(browser: Browser) -> None:
    """Check that nothing is cut off and that all text has a contrast of at least 4.5 to 1 (WCAG 2.2, 1.4.3)."""
    assert await browser.ask("document.documentElement.scrollWidth <= innerWidth")
    cut, faint = await browser.ask(CUT), await browser.ask(FAINT)
    assert cut == [], f"cut off: {cut}"
    assert faint == [], f"hard to read: {faint}"
    scrolled = "[...document.querySelectorAll('table')].filter(t => !t.closest('.scroll, .hidden')).length"
    assert await browser.ask(scrolled) == 0
