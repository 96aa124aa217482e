"""AIST names, prompts and the cameras in use."""

import itertools
from pathlib import Path

import pytest

from data_names import AIST_BASE, GENRES, AistName, Source, parse_aist, read_source


@pytest.mark.parametrize(
    "stem, parts",
    [
        ("gBR_sBM_c01_d04_mBR0_ch01", AistName("BM", 1, "BR", (4,), "mBR0")),
        ("gJB_sFM_c10_d07_mJB5_ch21", AistName("FM", 10, "JB", (7,), "mJB5")),
        ("gPO_sMM_c09_d10_mPO3_ch11", AistName("MM", 9, "PO", (10,), "mPO3")),
        ("gLH_sGR_c02_d16_d17_d18_mLH1_ch02", AistName("GR", 2, "LH", (16, 17, 18), "mLH1")),
        ("sSH_c01_v0", AistName("SH", 1)),
        ("sCY_c10_v12", AistName("CY", 10)),
        ("sBT_c03", AistName("BT", 3)),
        ("gHO_sSH_c01_d19_v0", AistName("SH", 1)),
        ("gXX_sBM_c01_d04_mBR0_ch01", None),  # no such genre, situation, camera, dancer, track
        ("gBR_sXX_c01_d04_mBR0_ch01", None),
        ("gBR_sBM_c11_d04_mBR0_ch01", None),
        ("gBR_sBM_c01_d36_mBR0_ch01", None),
        ("gBR_sBM_c01_d04_mBR6_ch01", None),
        ("gBR_sBM_c01_d04_mXX0_ch01", None),
        ("gBR_sBM_c01_mBR0_ch01", None),
        ("gBR_sBM_c01_d04_mBR0_ch01_copy", None),
        ("my holiday", None),
    ],
)
def test_name_is_read_as_the_scheme_says(stem, parts):
    assert parse_aist(stem) == parts


WORDS = {
    "genre": "BR Break, PO Pop, LO Lock, MH Middle Hip-hop, LH LA style Hip-hop, HO House, WA Waack, KR Krump, "
    "JS Street Jazz, JB Ballet Jazz",
    "situation": "BM basic dance, FM advanced dance, MM moving camera, GR group dance, SH showcase, CY cypher, "
    "BT battle",
    "camera": "01 front view, 02 front-left diagonal view, 03 left side view, 04 back-left diagonal view, "
    "05 back view, 06 back-right diagonal view, 07 right side view, 08 front-right diagonal view, "
    "09 close-up front view from a low angle, 10 moving front view",
    "dancer": ", ".join(f"{d:02d} {'fe' * (d in (1, 2, 3, 7, 8, 9, 12, 13, 15, 16, 18, 19, 25, 26, 27))}male"
                        for d in range(1, 36)),
}  # fmt: skip


def test_every_genre_situation_camera_and_dancer_of_the_scheme_has_its_words():
    rows = [[row.split(" ", 1) for row in table.split(", ")] for table in WORDS.values()]
    assert [len(table) for table in rows] == [10, 7, 10, 35]
    for (genre, style), (situation, setting), (camera, view), (dancer, sex) in itertools.product(*rows):
        name = parse_aist(f"g{genre}_s{situation}_c{camera}_d{dancer}_m{genre}3_ch01")
        assert name == AistName(situation, int(camera), genre, (int(dancer),), f"m{genre}3")
        start = f"a {style} dance performance by a professional {sex} dancer in a pristine white studio"
        assert name.prompts()[3] == f"{start}, {view}, {setting}"


def test_tempo_is_80_plus_10_index_and_house_110_plus_5_index():
    for genre in GENRES:
        bpm = [parse_aist(f"g{genre}_sBM_c01_d04_m{genre}{i}_ch01").bpm for i in range(6)]
        assert bpm == ([110, 115, 120, 125, 130, 135] if genre == "HO" else [80, 90, 100, 110, 120, 130])


def test_prompts_are_the_templates_verbatim():
    assert parse_aist("gMH_sBM_c01_d24_mMH0_ch01").prompts() == (
        "a professional male dancer dancing Middle Hip-hop in a basic dance setting in a studio with a white backdrop, "
        "captured from a front view",
        "a front view video of a professional male dancer performing Middle Hip-hop choreography against a white "
        "background in a basic dance scene",
        "a professional male dancer executing Middle Hip-hop movements in a minimalist studio space in a basic dance "
        "setting, shot from a front view",
        "a Middle Hip-hop dance performance by a professional male dancer in a pristine white studio, front view, "
        "basic dance",
    )


def test_dancers_are_joined_by_commas_and_one_and():
    woman, man = "a professional female dancer", "a professional male dancer"
    names = {(16, 17): f"{woman} and {man}", (16, 17, 18): f"{woman}, {man} and {woman}"}
    for dancers, words in names.items():
        prompt = AistName("GR", 10, "LH", dancers, "mLH1").prompts()[0]
        assert prompt.startswith(f"{words} dancing LA style Hip-hop in a group dance setting")
        assert prompt.endswith("captured from a moving front view")


def test_showcases_without_a_genre_get_the_base_prompt():
    assert parse_aist("sSH_c01_v0").prompts() == (AIST_BASE,)


def test_female_dancers_are_the_fifteen_of_aist():
    female = [d for d in range(1, 36) if "female" in AistName("BM", 1, "BR", (d,), "mBR0").prompts()[0]]
    assert female == [1, 2, 3, 7, 8, 9, 12, 13, 15, 16, 18, 19, 25, 26, 27]


def test_cameras_are_those_asked_for():
    names = [f"gBR_sBM_c{c:02d}_d04_mBR1_ch01.mp4" for c in range(1, 11)]
    used = [isinstance(read_source(Path(name), [1, 10]), Source) for name in names]
    assert used == [True] + [False] * 8 + [True]
