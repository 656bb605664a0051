import random

import pytest
from fakes import CHAT_TEMPLATE, FakeTokenizer, save_byte_tokenizer

from sidp_jax.request import RequestError
from sidp_jax.tokenizer import Detokenizer, TokenizerError, load_tokenizer

TEXTS = ["hello world", "grüße 🙂 日本語", "the quick brown fox\n\n", "a🙂b", "  two  spaces"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(save_byte_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def test_no_tokenizer_in_the_folder(tmp_path):
    assert load_tokenizer(tmp_path) is None


def test_a_damaged_tokenizer_is_an_error(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerError, match=str(tmp_path)):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("text", TEXTS)
def test_encode_and_decode_are_those_of_transformers(tokenizer, text):
    token_ids = tokenizer.encode(text)
    assert token_ids == tokenizer.hf(text)["input_ids"]
    assert tokenizer.decode(token_ids) == text == tokenizer.hf.decode(token_ids)


def test_special_and_unknown_tokens_are_no_text(tokenizer):
    assert tokenizer.decode([0, *tokenizer.encode("a"), 1, 100_000]) == "a"
    assert tokenizer.decode([0], skip_special_tokens=False) == "<bos>"
    assert not tokenizer.is_text(0)
    assert not tokenizer.is_text(100_000)
    assert tokenizer.is_text(tokenizer.encode("a")[0])


def test_lone_surrogates_are_refused(tokenizer):
    with pytest.raises(RequestError, match="Unicode"):
        tokenizer.encode("a\ud800")


def test_chat(tokenizer):
    messages = [{"role": "user", "content": "hello"}]
    text, token_ids = tokenizer.encode_chat(messages, {"tail": "!"})
    assert text == "<user>hello<assistant>!"
    assert token_ids == tokenizer.encode(text)
    assert text == tokenizer.hf.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, tail="!"
    )


def test_chat_templates_may_refuse(tokenizer, tmp_path):
    with pytest.raises(RequestError, match="no tools here"):
        tokenizer.encode_chat([{"role": "tool", "content": "x"}])
    assert "raise_exception" in CHAT_TEMPLATE
    bare = load_tokenizer(save_byte_tokenizer(tmp_path, chat_template=None))
    with pytest.raises(RequestError, match="no chat template"):
        bare.encode_chat([{"role": "user", "content": "x"}])


def feed(detokenizer, token_ids):
    """Appends until a stop string comes; returns it and the number of tokens."""
    for count, token_id in enumerate(token_ids, start=1):
        if stop := detokenizer.append(token_id):
            return stop, count
    return None, len(token_ids)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("stop", [(), ("never there",)])
def test_text_grows_to_what_transformers_decodes(tokenizer, text, stop):
    token_ids = tokenizer.encode(text)
    detokenizer = Detokenizer(tokenizer, tokenizer.encode("hello"), stop)
    for end, token_id in enumerate(token_ids, start=1):
        assert detokenizer.append(token_id) is None
        assert detokenizer.text == tokenizer.hf.decode(token_ids[:end])
    assert detokenizer.text == text


def test_a_character_split_over_tokens_stops_when_it_is_complete(tokenizer):
    token_ids = tokenizer.encode("ab🙂cd")
    detokenizer = Detokenizer(tokenizer, [5], ("🙂",))
    stop, count = feed(detokenizer, token_ids)
    assert stop == "🙂"
    assert tokenizer.decode(token_ids[:count]) == "ab🙂"
    assert detokenizer.text == "ab"


def test_a_stop_string_over_many_tokens(tokenizer):
    detokenizer = Detokenizer(tokenizer, [5], ("xyz xyz",))
    stop, _ = feed(detokenizer, tokenizer.encode("hello xyz xyz world"))
    assert (stop, detokenizer.text) == ("xyz xyz", "hello ")


def test_special_tokens_do_not_hide_a_stop_string(tokenizer):
    x, y = tokenizer.encode("x")[0], tokenizer.encode("y")[0]
    detokenizer = Detokenizer(tokenizer, [5], ("xy",))
    stop, _ = feed(detokenizer, [x, *[1] * 50, y])
    assert (stop, detokenizer.text) == ("xy", "")


def test_the_stop_string_complete_first_wins_then_the_one_listed_first():
    class Chunks(FakeTokenizer):
        """Several characters per token."""

        def decode(self, token_ids, *, skip_special_tokens=True):
            return "".join(["one ", "two ", "three"][token_id] for token_id in token_ids)

    def result(stop):
        detokenizer = Detokenizer(Chunks(), [], stop)
        return feed(detokenizer, [0, 1, 2])[0], detokenizer.text

    assert result(("wo", "t", "one t")) == ("t", "one ")
    assert result(("e", "ne")) == ("e", "on")
    assert result(("ne", "e")) == ("ne", "o")
    assert result(("hre", "thre")) == ("hre", "one two t")


def test_going_on_after_a_stop_string_makes_it_text(tokenizer):
    """The engine does that below min_tokens."""
    detokenizer = Detokenizer(tokenizer, [5], ("x",))
    found = [detokenizer.append(token_id) for token_id in tokenizer.encode("axbxc")]
    assert found == [None, "x", None, "x", None]
    assert detokenizer.text == "axbxc"


def test_without_a_tokenizer():
    detokenizer = Detokenizer(None, [1], ())
    assert detokenizer.append(7) is None
    assert detokenizer.text == ""
    with pytest.raises(RequestError, match="needs a tokenizer"):
        Detokenizer(None, [1], ("x",))


def test_a_space_at_the_beginning_is_kept(tmp_path):
    """Tokenizers of the Llama 2 kind drop it where the decoded text begins."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({"▁hello": 0, "▁world": 1, "<unk>": 2}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.decoder = decoders.Metaspace()
    PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>").save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    detokenizer = Detokenizer(tokenizer, tokenizer.encode("hello"), ())
    detokenizer.append(1)
    assert detokenizer.text == " world"


@pytest.mark.parametrize("seed", range(20))
def test_random_tokens_against_a_search_of_the_whole_text(tokenizer, seed):
    rng = random.Random(seed)
    alphabet = [*tokenizer.encode("abé🙂 hello"), 0, 1]
    token_ids = [rng.choice(alphabet) for _ in range(60)]
    stop = tuple({"".join(rng.choices("abé🙂 ", k=rng.randint(1, 3))) for _ in range(3)})
    detokenizer = Detokenizer(tokenizer, [5], stop)
    found, count = feed(detokenizer, token_ids)
    for end in range(len(token_ids) + 1):
        text = tokenizer.decode(token_ids[:end])
        hits = [
            (text.find(string) + len(string), order, string)
            for order, string in enumerate(stop)
            if string in text
        ]
        if hits:
            stopped_at, _, string = min(hits)
            assert (found, count) == (string, end)
            assert detokenizer.text == text[: stopped_at - len(string)]
            break
    else:
        assert found is None
        assert detokenizer.text == tokenizer.decode(token_ids)
