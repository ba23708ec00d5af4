"""An HTML page, taken apart for tests."""

from html.parser import HTMLParser


class Page(HTMLParser):
    """Collects what the tests ask about."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.references: list[str] = []
        self.labels: list[str] = []
        self.words = ""
        self._silent = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._silent = tag in ("style", "script")
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("href", "src", "xlink:href", "srcset", "data", "action"):
                self.references.append(value or "")
            if name == "aria-label":
                self.labels.append(value or "")
            assert not name.startswith("on"), f"script attribute {name}"

    def handle_data(self, data: str) -> None:
        if not self._silent:
            self.words += data
