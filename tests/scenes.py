"""What Vega draws: the items of a scenegraph of `vl_convert.vegalite_to_scenegraph`."""


def items(mark, kind, role="mark"):
    """The items of all marks of a kind and role below one."""
    for item in mark.get("items", []):
        if mark.get("role") == role and mark["marktype"] == kind:
            yield item
        for below in item.get("items", []):
            yield from items(below, kind, role)
