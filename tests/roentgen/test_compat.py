"""The pinned versions have what is relied on, and one that has not is named."""

import pytest

from roentgen import compat


@pytest.mark.parametrize("library", compat.PARTS)
def test_the_installed_versions_have_all_parts(library: str) -> None:
    compat.check(library)


@pytest.mark.parametrize(
    "part", ["nnsight._none:Envoy", "nnsight:None_", "nnsight:Envoy._wrap_envoy(name, renamed)", "nnsight:Envoy._gone"]
)
def test_a_version_that_lacks_one_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    monkeypatch.setitem(compat.PARTS, "nnsight", {part: "does something"})
    with pytest.raises(ImportError, match=r"nnsight 0\.8\.1 is not supported: it lacks .*which does something"):
        compat.check("nnsight")
