"""Pages -> HTML: templates, the JavaScript of charts, and the policy that forbids a page every request."""

import hashlib
import json
from contextlib import AbstractContextManager
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import altair as alt
import jinja2
import vl_convert
from altair.utils.schemapi import debug_mode
from markupsafe import Markup

from scspec.charts import THEMES
from scspec.results import atomic_file

Chart = alt.TopLevelMixin  # what the functions of `scspec.charts` return


def unvalidated_charts() -> AbstractContextManager[None]:
    """Within it Altair does not validate charts as they are put together: with the rows of a large grid, most of the
    time. The tests of charts do."""
    return debug_mode(False)


def chart_entry(chart_id: str, title: str, chart: Chart, caption: str) -> dict[str, Any]:
    """What a page needs of a chart; the page's theme has the frame, and the page says the mode itself."""
    spec = chart.to_dict(validate=False)
    del spec["config"]["view"], spec["$schema"]
    return {"id": chart_id, "title": title, "spec": spec, "label": spec["description"], "caption": caption}


def write_page(path: Path, template: str, page: dict[str, Any]) -> None:
    """Writes a page atomically. page: what the template shows; "charts": its `chart_entry`s, none for no script."""
    specs = {chart["id"]: chart["spec"] for chart in page["charts"]}
    nonce = hashlib.sha256(json.dumps([page["root"], page["heading"], specs]).encode()).hexdigest()
    script = {"specs": specs, "themes": THEMES, "vega": _vega() if specs else "", "nonce": nonce}
    html = _environment().get_template(template).render(page, **script)
    with atomic_file(path) as file:
        file.write(html.encode())


@cache
def _environment() -> jinja2.Environment:
    """Environment with the templates beside this file."""
    folder = resources.files("scspec.report").joinpath("templates")
    loader = jinja2.FunctionLoader(lambda name: folder.joinpath(name).read_text(encoding="utf-8"))
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, loader=loader
    )
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False}  # charts are drawn in the order of the page
    return environment


@cache
def _vega() -> Markup:
    """Vega, Vega-Lite and Vega-Embed as one script, those that Altair's specifications are for."""
    version = ".".join(alt.SCHEMA_VERSION.split(".")[:2])
    vega = vl_convert.javascript_bundle(vl_version=version)  # type: ignore[call-arg]  # its stub wants a snippet too
    # The bundle is not text from outside, but `</script` in one of its strings would end the element.
    return Markup(vega.replace("</script", "<\\/script"))
