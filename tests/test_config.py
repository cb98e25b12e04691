"""Tests of the configuration: precedence, one-line error messages, and loading of all job files."""

from pathlib import Path

import pytest

from lmu_dist.config import Config, ConfigError, Rule, flatten, load, parse, sources, to_dict

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
        ("modle.family=lmu", r"^modle: unknown key; did you mean model, as in model.family\?$"),
        ("trian=1", r"^trian: unknown key; did you mean train\?$"),
        (
            "tune={families: lmu, n_params: 1, space: {train: {lerning_rate: {log: [1, 2]}}}}",
            r"^tune.space.train.lerning_rate: write a key that has dots in braces: "
            r"tune.space=\{train.learning_rate: \{log: ...\}\}$",
        ),
        ("learningrate=1", r"^learningrate: unknown key; did you mean train.learning_rate\?$"),
        ("batch_tokens=1", r"^batch_tokens: unknown key; did you mean train.batch_tokens\?$"),
        ("xyzzy=1", r"^xyzzy: unknown key; docs/configuration.md has all keys$"),
        ("train.tokens=many", "^train.tokens: must be a whole number such as 2000, 1e6 or 10M, not 'many'$"),
        ("train.tokens=1,000,000", "not '1,000,000'; write it without commas: 1_000_000$"),
        ("train.tokens=true", "^train.tokens: must be a whole number such as .*, not true$"),
        ("train.tokens=null", "^train.tokens: must be a whole number such as .*, not null$"),
        ("train.tokens=1.5", "^train.tokens: must be a whole number such as .*, not 1.5$"),
        ("train.tokens=[5]", "^train.tokens: must be a whole number such as .*, not a list$"),
        ("train.tokens=1e30", r"^train.tokens: must be less than 2\^63, not 1e\+30$"),
        ("train.tokens=-1", "^train.tokens: must be more than 0, not -1$"),
        ("cluster.gpus_per_worker=2", "^cluster.gpus_per_worker: must be at most 1, not 2$"),
        ("cluster.zero_stage=-1", "^cluster.zero_stage: must be at least 0, not -1$"),
        ("train.beta2=1", "^train.beta2: must be less than 1, not 1$"),
        ("train.learning_rate=.inf", "^train.learning_rate: must be a finite number, not inf$"),
        ("train.learning_rate=.nan", "^train.learning_rate: must be more than 0, not nan$"),
        ("train.learning_rate=1m", "^train.learning_rate: must be a number such as 0.001 or 1e-3, not '1m'$"),
        ("train.schedule=cos", r"^train.schedule: must be cosine or wsd, not 'cos'; did you mean cosine\?$"),
        ("cluster.activation_checkpointing=yes", "must be true or false, not 'yes'$"),
        ("experiment=5", """must be text, not 5; put it in quotes: experiment='"5"'$"""),
        ("data.files=null", "^data.files: must be a list, not null$"),
        ("data.validation_files=a.jsonl", "^data: validation_files needs source: files; of a data set give"),
        ("model.family='GPT 2'", r"^model.family: must be the name of a family \(lower-case .*\) or path.*CLASS, not 'GPT 2'$"),
        ("ladder={families: 'lmu,lstm', n_params: 1, tokens: 1}", r"several are a list: \[lmu, lstm\]$"),
        ("ladder={families: lmu, n_params: [], tokens: 1}", "^ladder.n_params: must not be empty; give a list"),
        ("ladder={famlies: lmu, n_params: 1, tokens: 1}", r"^ladder.famlies: unknown key; did you mean ladder.families\?$"),
        ("ladder={families: lmu, tokens: 1}", "^ladder.n_params: is missing; add it to the section ladder$"),
        ("ladder={families: lmu, n_params: 1}", "^ladder: give token budgets"),
        ("ladder={families: lmu, n_params: 1, tokens: 'a,b'}", r"^ladder.tokens\[0\]: .*; write a list as \[a, b\]$"),
        (
            "ladder={families: lmu, n_params: 1, tokens: 1, batch_tokens: x}",
            "must be a number, or a section with keys such as value",
        ),
        ("ladder=[lmu]", "^ladder: must be a section with keys such as families, n_params, tokens, not a list$"),
        ("tune={families: lmu, n_params: 1, space: x}", "^tune.space: must be a section of keys and values, not 'x'$"),
        ("tune={families: lmu, n_params: 1, space: {train.eps: {log: [1]}}}", r"eps.log: must be two values, \[low, high\]$"),
        (
            "tune={families: lmu, n_params: 1, space: {train.eps: {log: 1}}}",
            r"eps.log: must be two values, \[low, high\], not 1$",
        ),
        ("tune={families: lmu, n_params: 1, space: {train.eps: {log: [1, 2, 3]}}}", r"must be 2 values, \[low, high\], not 3$"),
        (
            "train.tokens=2020-01-01",
            "^train.tokens='2020-01-01': 2020-01-01 is a date in YAML; to mean text, put it in quotes$",
        ),
        ("seed={1: 2}", "a key must be a word, not 1"),
        ("seed=0x" + "f" * 5000, "more than 1024 bits"),
        ("seed=" + "9" * 5000, "too many digits"),
        ("seed=&a [*a]", "nested more than 20 deep"),
        ("seed=" + "[" * 1000 + "]" * 1000, "nested more than 20 deep"),
        ("a." * 30 + "b=1", "no key has that many sections"),
        ("a\nb=1", "is not of the form section.key=value"),
        ("experiment=\udcff", "^experiment=.* is not valid YAML"),
        ("train.lmu_form=fft", "^train.lmu_form: this key is now model.form$"),
        ("cluster.n_workers=9", "n_workers .* must not be more than the 8 rows"),
        ("train.batch_tokens=1000", "must be a multiple of sequence_tokens"),
        ("train.warmup_tokens=1e9", "must be less than train.tokens"),
        ("data.source=files", "needs files, a list of globs"),
        ("data.source=huggingface", "needs dataset"),
        ("data.tokenizer.kind=gpt2", "vocab_path and merges_path"),
        ("data.tokenizer.vocab_tokens=100", "at least 257"),
        ("experiment=../up", "^experiment: must be 1 to 100 letters, digits, .* not '../up'$"),
        ("train=3", "^train: must be a section with keys such as tokens, .*, not 3$"),
        ("nonsense", "not of the form"),
        ("train.tokens=[", "is not valid YAML"),
        ("seed.x=1", "seed is a value|seed: "),
    ],
)
def test_invalid_override_is_a_one_line_error_that_names_the_key(yaml: Path, override: str, message: str):
    with pytest.raises(ConfigError, match=message) as raised:
        load(yaml, [override])
    assert "\n" not in str(raised.value)


def test_at_most_ten_mistakes_are_listed():
    with pytest.raises(ConfigError) as raised:
        parse({f"key_{i}": 1 for i in range(50)})
    lines = str(raised.value).splitlines()
    assert (len(lines), lines[-1]) == (11, "and 40 more mistakes")


@pytest.mark.parametrize(
    ("text", "value"),
    [("10M", 10**7), ("10m", 10**7), ("10k", 10**4), ("1e4", 10**4), ("1_000_000", 10**6), ("1B", 10**9), ("2.5M", 2_500_000)],
)
def test_counts_are_accepted_as_people_write_them(tmp_path: Path, text: str, value: int):
    (tmp_path / "job.yaml").write_text(f"train: {{tokens: {text}, warmup_tokens: 0}}\nplan: {{worker_memory_bytes: 80G}}\n")
    assert load(tmp_path / "job.yaml").train.tokens == value
    sizes = f"n_params: {text}, tokens: '{text}', batch_tokens: {text.upper()}"
    ladder = f"ladder={{families: lmu, {sizes}, workers: {{n_params: 0, n_workers: 1}}}}"
    config = load(tmp_path / "job.yaml", [ladder, "data.files=a.jsonl"])
    assert config.ladder is not None
    assert (config.ladder.families, config.ladder.n_params, config.ladder.tokens) == (("lmu",), (value,), (value,))
    assert config.ladder.batch_tokens == Rule(value=value)
    assert (config.ladder.workers[0].n_workers, config.data.files) == (1, ("a.jsonl",))
    assert config.plan.worker_memory_bytes == 80e9


def test_tuned_and_searched_settings_are_accepted_as_people_write_them():
    tuned = {"family": "lmu", "n_params": "1k", "settings": {"train.batch_tokens": "8k"}}
    config = parse({"ladder": {"families": "lmu", "n_params": 1, "tokens": 1, "tuned": tuned}})
    assert config.ladder is not None
    assert config.ladder.tuned[0].settings == {"train.batch_tokens": 8000}
    space = {"train.batch_tokens": {"choice": ["2k", 4096]}, "train.schedule": {"choice": "wsd"}}
    config = parse({"tune": {"families": "lmu", "n_params": 1, "space": space}})
    assert config.tune is not None
    assert [where.choice for where in config.tune.space.values()] == [(2000, 4096), ("wsd",)]


def test_a_section_without_keys_is_the_defaults(tmp_path: Path):
    (tmp_path / "job.yaml").write_text("train:\n  # tokens: 5\ndata:\nladder:\n")
    assert load(tmp_path / "job.yaml") == Config()


def test_aliases_that_expand_beyond_the_limit_are_refused_at_once(tmp_path: Path):
    levels = ["a0: &a0 [1, 2]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 6)]
    (tmp_path / "job.yaml").write_text("\n".join(levels))
    with pytest.raises(ConfigError, match=r"its aliases \(\*name\) expand to more than 100,000 values") as raised:
        load(tmp_path / "job.yaml")
    assert "\n" not in str(raised.value)
    (tmp_path / "job.yaml").write_text(
        "train: &t {tokens: 1M}\nladder: {families: [lmu], n_params: [5], tokens: &n [1M], seeds: *n}\n"
    )
    assert load(tmp_path / "job.yaml").train.tokens == 10**6


def test_files_that_include_each_other_many_times_are_read_once(tmp_path: Path):
    for i in range(30):
        (tmp_path / f"{i}.yaml").write_text(f"include: [{i + 1}.yaml, {i + 1}.yaml]\nseed: {i}\n")
    (tmp_path / "30.yaml").write_text("experiment: last\n")
    assert (load(tmp_path / "0.yaml").experiment, load(tmp_path / "0.yaml").seed) == ("last", 0)
    assert len(sources(tmp_path / "0.yaml")) == 31


def test_unreadable_or_invalid_files_are_errors(tmp_path: Path):
    for content in (b"\xff\xfes\x00e\x00", b"#" * 1_000_001):
        (tmp_path / "bad.yaml").write_bytes(content)
        with pytest.raises(ConfigError, match=r"it is not UTF-8 text; give|has more than 1 MB; give"):
            load(tmp_path / "bad.yaml")
    (tmp_path / "bad.yaml").write_text("seed: 1\nseed: 2")
    with pytest.raises(ConfigError, match=r"bad.yaml is not valid YAML \(line 2, column 1\): found duplicate key"):
        load(tmp_path / "bad.yaml")
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
