"""A cell's page: what became of each token, how tokens read, which prompts are shown, and that texts stay texts."""

import huggingface_hub
import numpy as np
import pandas as pd
import pytest
from fake_cells import as_blocks, fake_keys, fake_rows
from report_pages import page_of, prompt_file

from scspec import aliases
from scspec.report.cell import prompt_totals
from scspec.report.transcript import ACCEPTED, BONUS, CORRECTION, REJECTED, tokenizer_here, transcript, visible
from scspec.stats import Tally
from scspec.stats.sums import alpha

MODEL, EOS = "smollm2-135m", 2


@pytest.fixture(scope="module")
def backend(tokenizer):
    """The real tokenizer as pages have it; `tokenizer` fetches it where it is not here yet."""
    tokenizer_here.cache_clear()
    return tokenizer_here(MODEL)


def block(proposed, emitted, accepted, *, gamma=None, kept=None):
    return {
        "proposed_ids": np.array(proposed, dtype=np.int32),
        "emitted_ids": np.array(emitted, dtype=np.int32),
        "accepted": accepted,
        "gamma": gamma or len(proposed),
        "kept": kept or len(emitted),
    }


def pieces(*blocks, tokenizer=None, max_tokens=1000):
    """The (kind, text) of each block; without a tokenizer texts are ids."""
    shown = transcript(pd.DataFrame(blocks), tokenizer, max_tokens).blocks
    return [[(kind, text if tokenizer else text.strip()) for kind, text in its] for its in shown]


@pytest.mark.parametrize(
    ("its", "expected"),
    {
        "all rejected": (block([11, 12], [21], 0), [(REJECTED, "11"), (CORRECTION, "21")]),
        "some": (
            block([11, 12, 13, 14], [11, 12, 23], 2),
            [(ACCEPTED, "11 12"), (REJECTED, "13"), (CORRECTION, "23")],
        ),
        "all accepted": (block([11, 12], [11, 12, 23], 2), [(ACCEPTED, "11 12"), (BONUS, "23")]),
        "replayed": (
            block([11, 12], [11, 22], 1, gamma=4),
            [(ACCEPTED, "11"), (REJECTED, "12"), (CORRECTION, "22")],
        ),
        "EOS is the correction": (block([11, 12], [EOS], 0), [(REJECTED, "11"), (CORRECTION, "2")]),
        "EOS among the accepted": (block([11, EOS, 13, 14], [11, EOS], 3), [(ACCEPTED, "11 2")]),
        "EOS is the last accepted": (block([11, EOS], [11, EOS], 2), [(ACCEPTED, "11 2")]),
        "budget before the rejection": (block([11, 12, 13], [11, 12, 23], 2, kept=1), [(ACCEPTED, "11")]),
        "budget at the rejection": (block([11, 12, 13], [11, 12, 23], 2, kept=2), [(ACCEPTED, "11 12")]),
    }.values(),
)
def test_what_became_of_each_token(its, expected):
    assert pieces(its) == [expected]


def test_blocks_stay_apart():
    assert pieces(block([1], [1, 3], 1), block([4], [5], 0)) == [
        [(ACCEPTED, "1"), (BONUS, "3")],
        [(REJECTED, "4"), (CORRECTION, "5")],
    ]


def test_a_long_text_is_cut_after_a_block():
    blocks = [block([1, 2], [1, 2, 3], 2)] * 5
    shown = transcript(pd.DataFrame(blocks), None, 4)
    assert (len(shown.blocks), shown.tokens, shown.left_out) == (2, 6, 9)
    shown = transcript(pd.DataFrame(blocks), None, 15)
    assert (len(shown.blocks), shown.tokens, shown.left_out) == (5, 15, 0)


def test_tokens_read_as_text_with_special_tokens_by_name(backend):
    proposed, emitted = backend.encode("The cat sat").ids, backend.encode("The cat slept").ids
    assert pieces(block(proposed, emitted, 2), block([EOS], [EOS], 1), tokenizer=backend) == [
        [(ACCEPTED, "The cat"), (REJECTED, " sat"), (CORRECTION, " slept")],
        [(ACCEPTED, "<|im_end|>")],
    ]


SPLIT = "日 💩 naïve"


@pytest.mark.parametrize("gamma", [1, 2, 3, 7])
def test_characters_split_over_tokens_are_whole(backend, gamma):
    """Wherever blocks begin: the text is the tokenizer's own, and has no replacement character."""
    ids = backend.encode(SPLIT).ids
    assert sum("\ufffd" in backend.decode([token]) for token in ids) > 3  # or nothing is split
    blocks = [
        block(part[:gamma] if len(part) > gamma else [*part, 99][:gamma], part, min(len(part), gamma), gamma=gamma)
        for part in (ids[at : at + gamma + 1] for at in range(0, len(ids), gamma + 1))
    ]
    texts = [text for its in pieces(*blocks, tokenizer=backend) for _, text in its]
    assert "".join(texts) == SPLIT


def test_a_rejected_token_is_read_behind_the_tokens_before_it(backend):
    """The draft and the target complete the same first bytes to different characters."""
    ours, theirs = backend.encode("💩").ids, backend.encode("💨").ids
    same = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
    assert same == len(ours) - 1 > 0
    its = block(ours, theirs, same)
    assert pieces(its, tokenizer=backend) == [[(REJECTED, "💩"), (CORRECTION, "💨")]]


def test_a_character_of_several_kinds_is_the_targets(backend):
    """Its first bytes are a correction, and the next block's accepted proposal completes it."""
    first, *others = backend.encode("💩").ids
    blocks = block([EOS], [first], 0), block(others, [*others, EOS], len(others))
    assert pieces(*blocks, tokenizer=backend) == [
        [(REJECTED, "<|im_end|>")],
        [(CORRECTION, "💩"), (BONUS, "<|im_end|>")],
    ]


def test_a_rejected_token_leaves_no_trace_behind(backend):
    word, half = backend.encode(" cat").ids, backend.encode("💩").ids[:1]
    its = block([*half, 5], word, 0)
    assert pieces(its, its, tokenizer=backend) == [[(REJECTED, "\ufffd"), (CORRECTION, " cat")]] * 2


def test_a_text_that_ends_within_a_character_says_so(backend):
    half = backend.encode("💩").ids[:2]
    assert pieces(block(half, half, 2, kept=2), tokenizer=backend) == [[(ACCEPTED, "\ufffd")]]
    cut = transcript(pd.DataFrame([block(half, half, 2), block([5], [5], 1)]), backend, 2)
    assert cut.blocks == [[]]
    assert cut.left_out == 1


def test_a_token_beyond_the_vocabulary_is_an_id(backend):
    assert pieces(block([50_000], [50_000], 1), tokenizer=backend) == [[(ACCEPTED, "[50000]")]]


def test_line_feeds_that_draft_and_target_differ_in_are_seen(backend):
    (feed,), (word,) = backend.encode("\n").ids, backend.encode("cat").ids
    assert pieces(block([feed], [word], 0), block([word], [feed], 0), block([feed], [feed], 1), tokenizer=backend) == [
        [(REJECTED, "↵"), (CORRECTION, "cat")],
        [(REJECTED, "cat"), (CORRECTION, "↵\n")],
        [(ACCEPTED, "\n")],
    ]


def test_controls_are_visible():
    assert (
        visible("a\0\x1b\x7f\x85\u202e\u2067\u200fb\t\n")
        == "a[U+0000][U+001B][U+007F][U+0085][U+202E][U+2067][U+200F]b\t\n"
    )
    assert visible("naïve \u05d0\u0644 👩\u200d💻") == "naïve \u05d0\u0644 👩\u200d💻"  # what joins letters stays


def replayed(rows):
    """The rows as a replay of their cell has them."""
    gone = {"method": "replay", "draft_time_s": None, "verify_time_s": None}
    return [{**row, **gone, "proposed_ids": row["proposed_ids"][: row["accepted"] + 1]} for row in rows]


def tags(page):
    return {name: sum(tag == name for tag, _ in page.tags) for name in ("del", "ins", "b")}


def test_a_page_says_what_the_cell_is(tmp_path, backend):
    page = page_of(tmp_path, fake_rows(fake_keys(draft_stoc_len=96), prompts=10))
    assert "<h1>smollm2-shorter/sc_sc/L128_d96_p8_g4_s0_n0</h1>" in page.source
    for part in (
        "pair, arm smollm2-shorter, SC target, SC draft stoc_len target / draft 128 / 96 sc_prec target / draft 8 / 8",
        "draft's streams 3/4 as long gamma 4 decoding greedy, loop seeds: sampling / target / draft 0 / 0 / 0",
        "computed on cpu: a processor, float32, backend cpu model smollm2-135m",
        "predicted from alpha",
        "of 10 prompts",
        "of the simulation",
    ):
        assert part in page.text
    float_text = page_of(tmp_path, fake_rows(fake_keys(arm="sc_float"), prompts=2)).text
    assert "stoc_len target / draft 128 / float sc_prec target / draft 8 / float draft's streams float" in float_text
    assert "alpha, 95 % none (fewer than 8 prompts)" in float_text


def test_a_page_links_back(tmp_path, backend):
    page = page_of(tmp_path, fake_rows(fake_keys(), prompts=2))
    assert page.attributes("href") == ["../../../index.html", "../../../pairs/smollm2-shorter.html"]
    assert page.scripts == []


def prompt_rows(prompt_id, alpha_of_it, *, time_s=0.01, **changed):
    """Rows whose tokens are shown as ids: each has a text, as the tokens of fake texts in a real vocabulary do not."""
    rows = fake_rows(fake_keys(target_model="none"), alpha=alpha_of_it, prompts=1, **changed)
    return [{**row, "prompt_id": prompt_id, "draft_time_s": time_s, "verify_time_s": time_s} for row in rows]


def test_the_worst_and_the_slowest_prompts(tmp_path):
    rows = [
        *prompt_rows("good", 1),
        *prompt_rows("slow", 1, time_s=9),
        *prompt_rows("bad", 0),
        *prompt_rows("middling", 0.5),
        *prompt_rows("better", 0.8),
    ]
    page = page_of(tmp_path, rows)
    listed = "Worst prompts prompt category alpha tokens bad short QA 0.000 40 middling short QA 0."
    assert listed in page.text
    worst, slowest = page.text.index("Worst prompts"), page.text.index("Slowest prompts")
    assert [name in page.text[worst:slowest] for name in ("bad", "middling", "better", "good", "slow")] == [
        *(True, True, True),
        *(False, False),
    ]
    # 8 blocks of gamma 4 that accept all; 40 that accept nothing
    assert "draft and target (s) tokens slow short QA 144.00 40 bad short QA 0.80 40" in page.text
    assert "The worst prompt: bad" in page.text
    assert "The slowest prompt: slow" in page.text
    assert tags(page) == {"del": 40 + 1, "ins": 40 + 1, "b": 8 + 1}  # and the legend's


def test_one_transcript_where_the_worst_is_the_slowest(tmp_path, backend):
    page = page_of(tmp_path, [*prompt_rows("bad", 0, time_s=9), *prompt_rows("good", 1)])
    assert "The worst and slowest prompt: bad" in page.text
    assert page.source.count("<h3>") == 1


def test_the_numbers_of_prompts_are_those_of_stats(tmp_path):
    blocks = as_blocks(fake_rows(fake_keys(do_sample=True), prompts=9, turns=2, spread=0.3, eos_rate=0.05))
    blocks["weight"] = np.random.default_rng(0).random(len(blocks))
    blocks = blocks.sample(frac=1, random_state=0)
    sums = Tally.of(blocks).sums.reset_index().sort_values("prompt_id")
    (prompts,) = prompt_totals(Tally.of(blocks)).values()
    found = pd.DataFrame(prompts)
    assert found[["prompt_id", "category"]].to_numpy().tolist() == sums[["prompt_id", "category"]].to_numpy().tolist()
    np.testing.assert_allclose(found["alpha"], alpha(sums), rtol=1e-12)
    np.testing.assert_allclose(found["tokens"], sums["tokens"], rtol=1e-12)
    np.testing.assert_allclose(found["time_s"], sums["draft_time_s"] + sums["verify_time_s"], rtol=1e-12)


def test_of_several_turns_the_first_is_shown(tmp_path, backend):
    rows = fake_rows(fake_keys(), alpha=0, prompts=1, turns=2, max_new_tokens=7)
    for row in rows:
        row["emitted_ids"] = [backend.token_to_id("a" if row["turn"] == 0 else "b")]
    page = page_of(tmp_path, rows[::-1])
    assert "The worst and slowest prompt: p00 , the first of 2 turns" in page.text
    assert page.source.count("<ins>a</ins>") == 7
    assert "<ins>b</ins>" not in page.source


def test_a_replay_of_greedy_texts_has_no_times(tmp_path, backend):
    page = page_of(tmp_path, replayed(fake_rows(fake_keys(), prompts=2)))
    assert "Slowest prompts" not in page.text
    assert "none: replayed" in page.text
    assert "The worst prompt:" in page.text
    assert tags(page)["del"] > 1


def test_a_replay_of_sampled_texts_has_no_text(tmp_path):
    page = page_of(tmp_path, replayed(fake_rows(fake_keys(do_sample=True), prompts=2)))
    assert "There is no one text to show" in page.text
    assert "Worst prompts" in page.text
    assert tags(page) == {"del": 0, "ins": 0, "b": 0}


def test_a_sampled_loop_has_a_text(tmp_path, backend):
    page = page_of(tmp_path, fake_rows(fake_keys(do_sample=True), prompts=2))
    assert "There is no one text" not in page.text
    assert tags(page)["del"] > 1


def test_without_the_tokenizer_ids_are_shown_and_the_page_says_so(tmp_path, backend):
    rows = fake_rows(fake_keys(target_model="nobody/nothing-of-the-kind"), alpha=0, prompts=1, max_new_tokens=3)
    page = page_of(tmp_path, rows)
    assert "The tokenizer of nobody/nothing-of-the-kind is not on this machine" in page.text
    for row in rows:
        assert f"<del>{row['proposed_ids'][0]} </del><ins>{row['emitted_ids'][0]} </ins>" in page.source
    assert "is not on this machine" not in page_of(tmp_path, fake_rows(fake_keys(), prompts=1)).text


def test_no_model_is_fetched_for_a_page(tmp_path, backend, monkeypatch):
    """A model's folder is looked up: in the cache of aliases, or by the hub's library told to stay offline."""
    folder = aliases.alias_folder(MODEL)
    monkeypatch.setenv("SCSPEC_CACHE", str(tmp_path))
    hub = {"here/model": folder}

    def snapshot_download(name, *, local_files_only):
        assert local_files_only
        if name not in hub:
            raise FileNotFoundError(name)
        return str(hub[name])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(aliases, "fetch_alias", lambda name: pytest.fail(f"fetched {name}"))
    assert tokenizer_here.__wrapped__(MODEL) is None
    assert tokenizer_here.__wrapped__("no/model") is None
    for name in ("here/model", str(folder)):
        assert tokenizer_here.__wrapped__(name).to_str() == backend.to_str()


@pytest.mark.parametrize("content", [None, b"", b"{}", b'{"model": {', b"\xff\xfe"])
def test_a_folder_without_a_tokenizer_that_can_be_read_has_none(tmp_path, content):
    if content is not None:
        (tmp_path / "tokenizer.json").write_bytes(content)
    assert tokenizer_here.__wrapped__(str(tmp_path)) is None


def test_a_name_that_is_no_model_has_no_tokenizer():
    for name in ("a name\0 that </script> is none", "nobody/nothing-of-the-kind"):
        assert tokenizer_here.__wrapped__(name) is None


NASTY = '</bdi><script>alert("1")</script><b>&amp;\'\u2028\u202e\u05d0\x1b💩'
SHOWN = '</bdi><script>alert("1")</script><b>&amp;\'\u2028[U+202E]\u05d0[U+001B]💩'


def test_texts_are_shown_not_run(tmp_path, backend):
    ids = backend.encode(NASTY).ids
    (row, *_) = fake_rows(fake_keys(draft_model=NASTY, backend=NASTY), prompts=1, categories=(NASTY,))
    text = block(ids, ids, len(ids), gamma=row["gamma"])
    row |= {**text, "prompt_id": NASTY, "beta": [1.0] * len(ids), "margin": [1.0] * len(ids)}
    page = page_of(tmp_path, [row], device=NASTY)
    assert page.scripts == []
    assert tags(page)["b"] == 1  # the legend's
    # two lists of prompt and category, device and backend, the draft, the heading of the transcript, and the text
    assert page.text.count(" ".join(SHOWN.split())) == 4 + 2 + 1 + 1 + 1
    assert page.source.count("white-space:pre-wrap") == 2  # of texts and of what stands in <bdi>
    for hidden in "\u202e\x1b":
        assert hidden not in page.source
    assert "&lt;script&gt;" in page.source
    assert "<bdi>&lt;/bdi&gt;" in page.source


def test_pages_are_small(tmp_path, backend):
    """The mean over acceptances with long texts; on every page the worst prompt is not the slowest."""
    sizes, prompts = [], prompt_file(tmp_path, "y" * 400, ids=[f"p{prompt:02d}" for prompt in range(8)])
    for gamma, truth in ((2, 0.3), (4, 0.5), (4, 0.7), (8, 0.9)):
        rows = fake_rows(fake_keys(gamma=gamma), alpha=truth, prompts=8, max_new_tokens=256, spread=0.05)
        for row in rows:
            row["verify_time_s"] += 9 * (row["prompt_id"] == "p07")
        page = page_of(tmp_path, rows, prompts=prompts)
        assert "The slowest prompt: p07" in page.text
        assert page.source.count("more tokens are left out") == 2
        sizes.append(len(page.source.encode()))
    assert np.mean(sizes) <= 8 * 1024
