from gear_loadtest.prompts import PromptMaker


def test_a_prompt_has_the_words_asked_for():
    assert len(PromptMaker(num_words=37, seed=0).make(0).split()) == 37


def test_no_two_prompts_share_a_beginning_that_a_prefix_cache_could_keep():
    maker = PromptMaker(num_words=64, seed=5)
    beginnings = {tuple(maker.make(index).split()[:16]) for index in range(500)}
    assert len(beginnings) == 500


def test_the_seed_decides_the_prompts():
    assert PromptMaker(8, seed=1).make(3) == PromptMaker(8, seed=1).make(3)
    assert PromptMaker(8, seed=1).make(3) != PromptMaker(8, seed=2).make(3)
