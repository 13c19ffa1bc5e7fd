"""The catalogue, as it is typed."""

import json

import pytest

from kd.models import __main__ as command
from kd.models import catalogue


def run(capsys, *words):
    code = command.main(list(words))
    out = capsys.readouterr()
    return code, out.out, out.err


def test_json_is_a_list_of_rows(capsys):
    code, out, _ = run(capsys, "resnet20", "vit_micro", "--classes", "100", "--size", "32", "--json")
    rows = json.loads(out)
    assert code == 0 and [r["name"] for r in rows] == ["resnet20", "vit_micro"]
    assert rows[0]["parameters"] == 278_324 and round(rows[0]["macs"] / 1e6, 1) == 40.8 and rows[0]["family"] == "cnn"
    assert list(rows[1]["stages"]) == ["stage1", "stage2", "stage3", "stage4"]


def test_tables_name_every_row(capsys):
    _, plain, _ = run(capsys, "resnet8", "--size", "16", "--classes", "10")
    assert "resnet8" in plain and "parameters" in plain
    _, table, _ = run(capsys, "resnet8", "--markdown")
    assert table.count("\n| ") == 3 and "83,892" in table


def test_search_finds_timms_networks(capsys):
    code, out, _ = run(capsys, "--search", "vit_tiny*")
    assert code == 0 and "vit_tiny_patch16_224" in out and "augreg_in21k_ft_in1k" in out
    assert run(capsys, "--search", "nothing_like_it")[0] == 2


def test_unknown_names_are_refused_before_anything_is_built(capsys):
    code, out, err = run(capsys, "resnet200000")
    assert code == 2 and not out and "Did you mean" in err
    with pytest.raises(KeyError, match="resnet20"):
        catalogue.preset("resnet21")


def test_a_network_that_does_not_fit_has_a_reason():
    (row,) = catalogue.survey(["vgg11_bn"], 10, 8)
    assert row["parameters"] is None and "cannot be built for 8x8" in row["reason"]


@pytest.mark.parametrize("family", ["cnn", "vit", "mlp", "hybrid", "mobile"])
def test_every_family_has_presets_for_both_roles(family):
    found = [n for n, s in catalogue.presets().items() if s["family"] == family]
    assert len(found) >= 6


@pytest.mark.slow
@pytest.mark.parametrize("size", [32, 64])
def test_every_preset_has_four_stages(size):
    for row in catalogue.survey(None, 10, size):
        assert len(row["stages"]) == 4, row
