"""daemon.config and daemon.agents: what is accepted, what is refused and how, and where each value came from."""

import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from consumers import rules
from daemon import agents, config, gate, prompts, settings, triggers, watch
from trainers import spec

AGENT = """
[agents.adjudication]
labels = ["APPROVED", "DENIED", "PENDING"]
prompt = "prompt.j2"
"""


@pytest.fixture
def write(tmp_path):
    """Write a configuration and its prompt; returns the path."""
    (tmp_path / "prompt.j2").write_text("{{ input.diagnosis }}: ")

    def write_config(text, *, agent=AGENT):
        path = tmp_path / "ratchet.toml"
        path.write_text(text + agent)
        return path

    return write_config


def refusal(path, environ=None):
    with pytest.raises(config.ConfigRefusedError) as caught:
        config.load(path, environ or {})
    return str(caught.value)


def test_an_empty_file_is_a_valid_configuration_without_agents(write, tmp_path):
    settings = config.load(write("", agent=""), {})
    assert settings.database.url == f"sqlite:///{tmp_path}/ratchet.db"
    assert settings.server.host == "127.0.0.1"
    assert settings.agents == {}


def test_relative_paths_count_from_the_configuration_file(write, tmp_path):
    settings = config.load(write('[storage]\nruns = "far/runs"\nadapters = "/elsewhere"\n'), {})
    agent = settings.agents["adjudication"]
    assert settings.storage.runs == tmp_path / "far" / "runs"
    assert settings.storage.adapters == Path("/elsewhere")
    assert agent.base_model == tmp_path / "models" / "base"
    assert agent.publisher.path == tmp_path / "serving" / "adjudication" / "current.json"


def test_home_moves_everything_that_is_relative(write, tmp_path):
    settings = config.load(write("", agent=""), {"RATCHET_HOME": "/srv/ratchet"})
    assert settings.storage.runs == Path("/srv/ratchet/runs")
    assert settings.database.url == "sqlite:////srv/ratchet/ratchet.db"


def test_settings_are_frozen(write):
    settings = config.load(write(""), {})
    with pytest.raises(ValidationError, match="frozen"):
        settings.server.port = 1
    with pytest.raises(ValidationError, match="frozen"):
        settings.agents["adjudication"].budget.share = 1


@pytest.mark.parametrize(
    ("text", "variables", "sentences"),
    [
        ("[server]\nprot = 1\n", {}, ["unknown key server.prot = 1: did you mean server.port?"]),
        ("[sever]\nport = 1\n", {}, ['unknown key sever = {"port": 1}: did you mean server?']),
        ("threshold = 0.5\n", {}, ["unknown key threshold = 0.5: did you mean agents.NAME.threshold?"]),
        ("[log]\ncolour = 1\n", {}, ["unknown key log.colour = 1: log knows level, format"]),
        ('[server]\nport = "8420"\n', {}, ['server.port = "8420": should be a valid integer']),
        ("[server]\nport = 70000\n", {}, ["server.port = 70000: should be less than or equal to 65535"]),
        ('[log]\nlevel = "loud"\n', {}, ["log.level = \"loud\": should be 'debug', 'info', 'warning' or 'error'"]),
        (
            '[devices]\nslots = ["gpu"]\n',
            {},
            ['devices.slots.0 = "gpu": should be `auto` (each other card'],
        ),
        ("", {"RATCHET_SERVER__PORT": "x"}, ['RATCHET_SERVER__PORT: server.port = "x": should be a valid integer']),
        ("", {"RATCHET_SERVER__HOSTS": "x"}, ['RATCHET_SERVER__HOSTS: unknown key server.hosts = "x": did you mean server.host?']),
        ("home = 1\n", {"RATCHET_HOME__X": "x"}, ["RATCHET_HOME__X: home is a value, not a section"]),
        ("[server\n", {}, ["isn't TOML", "line 1"]),
        ("agents = 3\n", {}, ["agents = 3: should be"]),
    ],
)
def test_a_refusal_names_the_key_the_value_and_what_would_be_right(write, text, variables, sentences):
    message = refusal(write(text, agent=""), variables)
    assert all(sentence in message for sentence in sentences), message
    assert "hunter2" not in message


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        ("audit_share = 0", "audit_share = 0: should be 0.001 or more: without cases drawn at random nobody can tell"),
        ("threshold = 1.7", "threshold = 1.7: should be less than or equal to 1"),
        ("threshold = nan", "threshold = NaN: should be a finite number"),
        ('approved = "YES"\ndenied = "DENIED"', "`approved` = 'YES' should be one of the labels APPROVED, DENIED, PENDING"),
        ('denied = "DENIED"', "`approved` and `denied` should be two different labels, or both left out"),
        ('must_review = [{ field = "decision", op = "like", value = "P" }]', 'must_review.0.op = "like": should be'),
        ('must_review = [{ field = "amount", op = "above", value = 1 }]', 'field = "amount": should be `decision`, `input.NAME` or'),
        ('must_review = [{ field = "input.amount", op = "above", value = "1" }]', "`above` compares with a number, not with '1'"),
        ('must_review = [{ field = "decision", op = "in", value = "P" }]', "a list of values belongs to `in`"),
        (
            'triggers = { cron = "0 3 * *" }',
            'triggers.cron = "0 3 * *": Wrong number of fields; got 4, expected 5: write it as `0 3 * * sun`',
        ),
        ('publisher = { kind = "reference" }', "`url` is missing"),
        ('publisher = { confirm = "command" }', "`confirm_command` is missing"),
        ("training = { clip = inf }", "agents.adjudication.training.clip = Infinity: should be a finite number"),
        ("training = { new_weight = inf }", "agents.adjudication.training.new_weight = Infinity: should be a finite number"),
        ("training = { pretrain = { general_share = nan } }", "training.pretrain.general_share = NaN: should be a finite number"),
        ("training = { rank = 8 }", "did you mean agents.NAME.training.lora.rank?"),
        ('training = { method = "full", load_in_4bit = true }', "method full can't load_in_4bit: use method qlora"),
        ('training = { method = "full", optimizer_in_backward = true, clip = 1 }', "leave accumulation and clip out"),
        ('training = { method = "pretrain" }', "`texts` is missing: training.method `pretrain` reads text files"),
        ('name = "other"', "an agent is called as its table"),
        ("columns = { input = [] }", "columns.input = []: should name a column, or several that are the input's fields"),
        ("budget = { share = 0 }", "budget.share = 0: should be greater than 0"),
        ('slices = ["a\\nb"]', r'slices.0 = "a\nb": should hold no line break and no tab'),
    ],
)
def test_an_agent_is_refused_with_a_remedy(write, lines, sentence):
    assert sentence in refusal(write("", agent=AGENT + lines + "\n"))


def test_a_method_brings_its_own_defaults_and_what_is_given_counts(write):
    agent = config.load(write("", agent=AGENT + 'training = { method = "qlora", lora = { rank = 32 } }\n')).agent("adjudication")
    assert (agent.training.load_in_4bit, agent.training.lora.rank, agent.training.lora.alpha, agent.training.epochs) == (True, 32, 128, 3)


@pytest.mark.parametrize(
    ("labels", "told"), [('["A"]', "should have at least 2 items, not 1"), ('["A", "B\\t"]', "should hold no line break")]
)
def test_a_list_is_refused_for_its_length_or_for_an_entry_and_not_for_both(write, labels, told):
    message = refusal(write("", agent=AGENT.replace('["APPROVED", "DENIED", "PENDING"]', labels)))
    assert told in message
    assert len(message.splitlines()) == 1, message


def test_every_mistake_is_named_at_once(write):
    message = refusal(write("[server]\nport = -1\n[log]\nlevel = 3\n"))
    assert len(message.splitlines()) == 2


def test_an_agents_name_is_a_slug(write):
    for name in ("Ärger/1", "A"):
        sentence = f'agents.{name}.name = "{name}": should be small letters and digits, parted by `-` or `_`'
        assert sentence in refusal(write("", agent=AGENT.replace("adjudication", f'"{name}"')))


def test_a_variable_for_an_agent_that_is_not_there_is_named(write):
    sentence = "RATCHET_AGENTS__X__THRESHOLD: there is no agent 'x': the configuration has adjudication"
    assert refusal(write(""), {"RATCHET_AGENTS__X__THRESHOLD": "0.5"}) == sentence
    assert "agents is a value, not a section" in refusal(write("agents = 3\n", agent=""), {"RATCHET_AGENTS__X__THRESHOLD": "0.5"})


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://u:hunter2@h/d", "postgresql+psycopg://u:***@h/d"),
        ("postgresql://u:hun/ter2@h/d", "postgresql+psycopg://u:***@h/d"),
        ("postgresql://u:hun@ter2@h/d", "postgresql+psycopg://u:***@h/d"),
        ("postgresql://h/d?user=u&password=hunter2", "postgresql+psycopg://h/d?user=u&password=***"),
        ("postgresql://h/d?sslPassword=hunter2&sslmode=require", "postgresql+psycopg://h/d?sslPassword=***&sslmode=require"),
        ("postgresql://u@h:5433/d?sslmode=require", "postgresql+psycopg://u@h:5433/d?sslmode=require"),
    ],
)
def test_no_password_is_shown_wherever_it_stands_in_a_url(write, url, shown):
    reading = config.read(write(f'[database]\nurl = "{url}"\n'), {})
    assert next(value.value for value in reading.values() if value.key == "database.url") == shown


@pytest.mark.parametrize("port", ["", "abc", "5432x"])
def test_a_database_whose_port_is_none_is_refused_and_its_password_not_shown(write, port):
    message = refusal(write(f'[database]\nurl = "postgresql://u:hunter2@h:{port or 70000}/d"\n'))
    assert f'database.url = "postgresql://u:***@h:{port or 70000}/d": ' in message
    assert ("postgresql://USER:PASSWORD@HOST:5432/NAME" if port else "should be between 1 and 65535") in message


def test_labels_that_differ_only_in_case_are_refused(write):
    assert "labels should differ" in refusal(write("", agent=AGENT.replace('"DENIED"', '"approved"')))


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        ("{{ input.a ", "line 1: unexpected end of template"),
        ("{{ input.a | shout }}", "line 1: No filter named 'shout'"),
        ("{{ claim.a }}", "uses claim: a template sees the claim as `input` and nothing else"),
    ],
)
def test_a_prompt_that_can_not_work_is_refused_at_start(write, tmp_path, template, sentence):
    path = write("")
    (tmp_path / "prompt.j2").write_text(template)
    assert sentence in refusal(path)


def test_a_missing_prompt_or_configuration_says_what_to_do(write, tmp_path):
    path = write("")
    (tmp_path / "prompt.j2").unlink()
    assert "prompt.j2 can't be read (No such file or directory): write the prompt template there" in refusal(path)
    assert "`ratchet init DIR` writes one" in refusal(tmp_path / "absent.toml")


def test_the_prompt_is_read_once_and_pinned_by_digest(write, tmp_path):
    agent = config.load(write(""), {}).agents["adjudication"]
    (tmp_path / "prompt.j2").write_text("changed")
    assert agent.prompt.render({"diagnosis": "M54"}) == "M54: "
    assert agent.prompt.digest == spec.digest_text("{{ input.diagnosis }}: ")
    model = spec.Model(name="v0", prompt=agent.prompt, labels=agent.labels)
    assert spec.Model.model_validate_json(model.model_dump_json()).prompt == spec.Prompt(text=agent.prompt.text)


def test_variables_override_the_file_and_reach_every_type(write, tmp_path):
    settings = config.load(
        write("[server]\nport = 1\n", agent=AGENT.replace("adjudication", "medical-analysis")),
        {
            "RATCHET_SERVER__PORT": "2",
            "RATCHET_SERVER__HOST": "0.0.0.0",
            "RATCHET_DEVICES__SLOTS": '["cuda:0", "cuda:1"]',
            "RATCHET_STORAGE__RUNS": "2024",
            "RATCHET_LOG__FORMAT": "json",
            "RATCHET_AGENTS__MEDICAL_ANALYSIS__TRIGGERS__DRIFT": "false",
            "RATCHET_AGENTS__MEDICAL_ANALYSIS__BUDGET__SHARE": "0.1",
            "RATCHET_CONFIG": "not a setting",
            "PATH": "not ours",
        },
    )
    agent = settings.agents["medical-analysis"]
    assert (settings.server.port, settings.server.host, settings.log.format) == (2, "0.0.0.0", "json")
    assert settings.devices.slots == ("cuda:0", "cuda:1")
    assert settings.storage.runs == tmp_path / "2024"
    assert (agent.triggers.drift, agent.budget.share) == (False, 0.1)


def test_every_value_says_where_it_came_from(write):
    reading = config.read(
        write("[server]\nport = 1\n[log]\n"), {"RATCHET_DATABASE__URL": "postgresql://u:hunter2@h/d", "RATCHET_LOG__LEVEL": "debug"}
    )
    values = {value.key: (value.value, value.source) for value in reading.values()}
    assert values["server.port"] == (1, "ratchet.toml")
    assert values["server.host"] == ("127.0.0.1", "default")
    assert values["log.level"] == ("debug", "RATCHET_LOG__LEVEL")
    assert values["log.format"] == ("auto", "default")
    assert values["database.url"] == ("postgresql+psycopg://u:***@h/d", "RATCHET_DATABASE__URL")
    assert values["agents.adjudication.labels"][1] == "ratchet.toml"


def test_a_changed_threshold_rule_limit_label_or_template_is_another_policy(write, tmp_path):
    base = config.load(write(""), {}).agents["adjudication"]
    changes = ["threshold = 0.8", "audit_share = 0.05", "must_review = []", "budget = { share = 0.2 }", 'slices = ["plan"]']
    changes += ['exam = { rule = "anytime" }', "exam = { gold_limit = 0.01 }", "watch = { alpha = 0.2 }"]
    changes += ['approved = "APPROVED"\ndenied = "DENIED"']
    digests = {base.policy_digest}
    for change in changes:
        digests.add(config.load(write("", agent=AGENT + change + "\n"), {}).agents["adjudication"].policy_digest)
    path = write("", agent=AGENT.replace("PENDING", "UNSURE"))
    digests.add(config.load(path, {}).agents["adjudication"].policy_digest)
    (tmp_path / "prompt.j2").write_text("another")
    digests.add(config.load(write(""), {}).agents["adjudication"].policy_digest)
    assert len(digests) == len(changes) + 3


def test_what_neither_routes_nor_judges_leaves_the_policy_as_it_is(write):
    base = config.load(write(""), {}).agents["adjudication"]
    other = config.load(write("", agent=AGENT + 'base_model = "elsewhere"\ntraining = { epochs = 9 }\n'), {}).agents["adjudication"]
    assert base.policy_digest == other.policy_digest


def test_the_routers_defaults_are_the_configurations(write):
    agent = config.load(write(""), {}).agents["adjudication"]
    assert agent.routing_policy == rules.RoutingPolicy(labels=agent.labels)


def test_the_defaults_of_gate_and_watch_are_the_configurations(write):
    agent = config.load(write("", agent=AGENT + 'approved = "APPROVED"\ndenied = "DENIED"\n'), {}).agents["adjudication"]
    assert agent.exam_policy == gate.ExamPolicy()
    assert agent.watch_policy == watch.WatchPolicy()


def test_the_triggers_reach_the_decision(write):
    text = AGENT + "triggers = { new_labels = 75, new_labels_min = 10, drift = false, policy_change = false }\n"
    agent = config.load(write("", agent=text), {}).agents["adjudication"]
    assert agent.trigger_policy == triggers.TriggerPolicy(labels=75, labels_min=10, on_drift=False, on_policy_change=False)


def test_rules_and_budget_reach_the_router(write):
    lines = (
        'must_review = [{ field = "input.amount", op = "above", value = 9 }]\nbudget = { share = 0.1, per_day = 7 }\nslices = ["plan"]\n'
    )
    policy = config.load(write("", agent=AGENT + lines), {}).agents["adjudication"].routing_policy
    assert policy.must_review == (rules.MustReview("input.amount", "above", 9),)
    assert (policy.budget_share, policy.budget_per_day, policy.slice_by) == (0.1, 7, ("plan",))


def test_an_agent_can_be_made_without_a_file():
    agent = agents.Agent(name="derived", labels=("A", "B"), prompt=prompts.PromptFile(text="{{ input.x }}"))
    assert agent.base_model == Path("models/base")
    assert agent.prompt.render({"x": 1}) == "1"


def test_an_unknown_agent_is_named_with_those_there_are(write):
    with pytest.raises(settings.UnknownAgentError, match="there is no agent 'scribe': the configuration has adjudication"):
        config.load(write(""), {}).agent("scribe")


def test_the_shipped_configuration_shows_the_defaults(tmp_path):
    """Uncommenting every line that shows a default changes nothing."""
    shipped = Path(config.__file__).parent / "templates"
    text = (shipped / "ratchet.toml").read_text()
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "adjudication.j2").write_text((shipped / "adjudication.j2").read_text())
    path = tmp_path / "ratchet.toml"
    path.write_text(text)
    quiet = config.load(path, {})
    path.write_text(re.sub(r"^#(?=\w)", "", text, flags=re.MULTILINE))
    assert config.load(path, {}) == quiet


def test_no_number_may_be_infinite(write):
    assert "finite" in refusal(write("[training]\nbackoff_seconds = inf\n"))
