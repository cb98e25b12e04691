"""Tests of the configuration: precedence, one-line error messages, and loading of all job files."""

from pathlib import Path

import pytest

from lmu_dist.config import Config, ConfigError, Rule, flatten, load, parse, to_dict

JOBS = sorted((Path(__file__).parents[1] / "jobs").glob("*.yaml"))


@pytest.fixture
def yaml(tmp_path: Path) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text("train:\n  learning_rate: 1e-3\n  tokens: 2.5e6\n")
    return path


def test_precedence_is_defaults_yaml_overrides(yaml: Path):
    config = load(yaml, ["train.learning_rate=2e-3", "data.files=[a, b]", "model.order=null", "train.tokens=1_000_000"])
    assert config.train.learning_rate == 2e-3
    assert config.train.tokens == 1_000_000
    assert config.data.files == ("a", "b")
    assert config.train.beta2 == Config().train.beta2
    assert load(yaml).train.tokens == 2_500_000


def test_to_dict_and_parse_are_inverse():
    config = parse({"seed": 3, "data": {"source": "files", "files": ["x"]}})
    assert parse(to_dict(config)) == config
    assert flatten(to_dict(config))["data.files"] == ["x"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.lerning_rate=1", r"^train.lerning_rate: unknown key; did you mean train.learning_rate\?$"),
        ("modle.family=lmu", "^modle: unknown key"),
        ("train.tokens=many", r"^train.tokens: .*integer \(got 'many'\)$"),
        ("train.tokens=true", "^train.tokens: .*integer"),
        ("train.tokens='5'", "^train.tokens: .*integer"),
        ("train.tokens=-1", "^train.tokens: .*greater than 0"),
        ("train.learning_rate=.nan", "^train.learning_rate: "),
        ("model.family='GPT 2'", "^model.family: "),
        ("train.lmu_form=fft", "^train.lmu_form: this key is now model.form$"),
        ("cluster.n_workers=9", "n_workers .* must not be more than the 8 rows"),
        ("train.batch_tokens=1000", "must be a multiple of sequence_tokens"),
        ("train.warmup_tokens=1e9", "must be less than train.tokens"),
        ("data.source=files", "needs files, a list of globs"),
        ("data.source=huggingface", "needs dataset"),
        ("data.tokenizer.kind=gpt2", "vocab_path and merges_path"),
        ("data.tokenizer.vocab_tokens=100", "at least 257"),
        ("experiment=../up", "^experiment: "),
        ("train=3", "^train: .*object"),
        ("nonsense", "not of the form"),
        ("train.tokens=[", "cannot read the value"),
        ("seed.x=1", "seed is a value|seed: "),
    ],
)
def test_invalid_override_is_a_one_line_error_that_names_the_key(yaml: Path, override: str, message: str):
    with pytest.raises(ConfigError, match=message) as raised:
        load(yaml, [override])
    assert "\n" not in str(raised.value)


def test_unreadable_or_invalid_files_are_errors(tmp_path: Path):
    with pytest.raises(ConfigError, match="cannot read"):
        load(tmp_path / "none.yaml")
    for text, message in (("a: [", "not valid YAML"), ("- 1", "keys and values"), ("seed: 1\nseed: 2", "not valid YAML")):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(ConfigError, match=message):
            load(tmp_path / "bad.yaml")


@pytest.mark.parametrize("job", JOBS, ids=lambda p: p.name)
def test_every_job_loads(job: Path):
    load(job)


def test_job_files_exist():
    assert JOBS


def test_included_files_supply_missing_keys(tmp_path: Path):
    (tmp_path / "tuned.yaml").write_text("train: {learning_rate: 0.5, tokens: 9e6}\nseed: 7\n")
    (tmp_path / "base.yaml").write_text("include: tuned.yaml\ntrain: {beta2: 0.9}\n")
    job = tmp_path / "job.yaml"
    job.write_text("include: [base.yaml]\ntrain: {learning_rate: 0.25}\n")
    config = load(job, ["train.beta2=0.8"])
    assert (config.train.learning_rate, config.train.tokens, config.train.beta2, config.seed) == (0.25, 9_000_000, 0.8, 7)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("include: job.yaml\n", "includes job.yaml, which includes it"),
        ("include: none.yaml\n", r"cannot read .*none\.yaml"),
        ("include: 5\n", "include must be the name of a file"),
        ("include:\n", "include must be the name of a file"),
    ],
)
def test_invalid_include_is_an_error_that_names_it(tmp_path: Path, text: str, message: str):
    job = tmp_path / "job.yaml"
    job.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load(job)


def test_rule_is_a_clipped_power_law():
    rule = Rule(value=0.01, at_n_params=1000, exponent=-0.5, least=0.002, most=0.02)
    assert [rule.at(n) for n in (1000, 4000, 100, 10**9)] == pytest.approx([0.01, 0.005, 0.02, 0.002])
    assert rule.at(4000, anchor=(0.016, 1000)) == pytest.approx(0.008)
