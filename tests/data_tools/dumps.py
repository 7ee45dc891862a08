"""A small MediaWiki dump."""

DUMP = """<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.10/" xml:lang="en">
  <siteinfo><sitename>Wikipedia</sitename></siteinfo>
  {pages}
</mediawiki>
"""
PAGE = """<page><title>{title}</title><ns>{ns}</ns><id>1</id>{redirect}
    <revision><id>2</id><text xml:space="preserve">{text}</text></revision></page>"""


def dump(*pages: tuple[str, str, str]) -> bytes:
    """A MediaWiki dump of (namespace, redirect element, text) pages."""
    pages_xml = [
        PAGE.format(title="A", ns=ns, redirect=redirect, text=text) for ns, redirect, text in pages
    ]
    return DUMP.format(pages="\n  ".join(pages_xml)).encode()
