// The pages of the board. Whatever comes from files, models or users is put in as text, never as HTML.

const $ = (id) => document.getElementById(id);
const T = JSON.parse($("strings").textContent);
const say = (name, ...values) => values.reduce((text, value, n) => text.replace(`{${n}}`, value), T[name] ?? name);
const on = (id, event, act) => $(id)?.addEventListener(event, act);
const put = (id, ...nodes) => $(id).replaceChildren(...nodes.flat(Infinity));
const root = document.documentElement;

/** An element: h("a", {href, class, onclick}, children...). */
function h(tag, props = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "style") Object.assign(element.style, value);
    else if (typeof value === "boolean") element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children.flat(Infinity).filter((child) => child != null));
  return element;
}

const div = (kind, ...children) => h("div", { class: kind }, ...children);
const doc = (...children) => h("p", { class: "doc" }, ...children);
const button = (text, kind, onclick) => h("button", { class: kind, onclick, type: "button" }, text);

function toast(text) {
  if ([...$("toasts").children].some((box) => box.textContent === text)) return; // a poll repeats what it says
  const box = div("toast", text);
  $("toasts").append(box);
  setTimeout(() => box.remove(), 8000);
}

const headers = { "Content-Type": "application/json" };
const post = (body) => ({ method: "POST", headers, body: JSON.stringify(body) });

/** The JSON answer to a request; null, with a message to the user, where it fails. */
async function api(path, body, quiet = false) {
  try {
    const answer = await fetch(`/api/${path}`, body ? post(body) : {});
    if (answer.status === 401) location.href = "/login";
    const said = await answer.json();
    if (answer.ok) return said;
    toast(said.error.message);
  } catch (error) {
    if (!quiet) toast(String(error));
  }
  return null;
}

/** Calls `act` now and every 2 seconds, one call at a time, while the page is visible. */
async function poll(act) {
  for (;;) {
    if (!document.hidden) await act();
    await new Promise((resolve) => setTimeout(resolve, 2000));
  }
}

/** Calls `act` when a button is clicked, which shows that for as long as it takes. */
function onClick(id, act) {
  on(id, "click", async () => {
    const text = $(id).textContent;
    [$(id).disabled, $(id).textContent] = [true, T.loading];
    await act();
    [$(id).disabled, $(id).textContent] = [false, text];
  });
}

const badge = (run) => h("span", { class: `badge ${run.state}` }, say(run.state),
  run.state === "failed" ? ` (${run.code})` : "");
const sizeOf = (bytes) => Math.abs(bytes) >= 1e9 ? `${(bytes / 1e9).toFixed(1)} GB` : `${(bytes / 1e6).toFixed(0)} MB`;

const isLong = (value) => Math.abs(value) >= 1e5 || (value !== 0 && Math.abs(value) < 1e-3);
const number = (value) => value == null ? "" : isLong(value) ? value.toExponential(2) : String(+value.toPrecision(5));
const tick = (value) => isLong(value) ? (+value.toPrecision(6)).toExponential().replace("e+", "e") : number(value);

// The list of runs

function actionsOf(run, size) {
  const stop = (force) => async () => {
    if (force && !confirm(T.kill_hint)) return;
    if (await api("stop", { run: run.id, force })) toast(force ? T.killed : T.stopping);
  };
  const ends = [button(T.stop, `quiet ${size}`, stop(false)), ...(size ? [] : [button(T.kill, "danger", stop(true))])];
  if (run.state === "running") return ends;
  const trains = run.command === "train";
  if (run.state === "other" || (trains && run.state === "done")) return [];
  return [button(trains ? T.again : T.repeat, `quiet ${size}`, () => api("again", { run: run.id }))];
}

function runsPage() {
  let [chosen, shown] = [new Set(), ""];
  const choose = (run) => (event) => {
    chosen[event.target.checked ? "add" : "delete"](run.id);
    [$("compare").hidden, $("compare").href] = [chosen.size < 2, `/compare?runs=${[...chosen].join(",")}`];
  };
  const row = (run) => h("tr", { "data-run": run.id }, [
    h("input", { type: "checkbox", "aria-label": T.compare, checked: chosen.has(run.id), onchange: choose(run) }),
    h("a", { href: `/run/${run.id}` }, run.id), run.command, badge(run), number(run.last.step), number(run.last.loss),
    new Date(run.created * 1000).toLocaleString(root.lang), actionsOf(run, "small"),
  ].map((cell, n) => h("td", n > 3 ? { class: n === 6 ? "quiet" : "num" } : {}, cell)));
  poll(async () => {
    const said = await api("runs", null, true);
    if (!said || shown === (shown = JSON.stringify(said.runs))) return;
    [$("empty").hidden, $("runs").hidden] = [said.runs.length > 0, !said.runs.length];
    const focus = document.activeElement;
    const place = `[data-run="${focus.closest("tr")?.dataset.run}"] ${focus.tagName}`;
    $("runs").tBodies[0].replaceChildren(...said.runs.map(row));
    if (!focus.isConnected) document.querySelector(place)?.focus();
  });
}

// One run, or several to compare

const COLOURS = ["#3b6fe0", "#e0733b", "#2a9d6f", "#a04fd0", "#d0457e", "#8a7a2e", "#2f9fc0", "#777"];
const FIRST = ["loss", "eval_loss", "reward", "eval_reward", "accuracy", "eval_accuracy", "reward_accuracy",
  "eval_reward_accuracy", "reward_margin", "eval_reward_margin", "entropy", "completions/mean_length",
  "learning_rate", "grad_norm", "tokens_per_second"];
const STEPS = [...Array(12).keys()].flatMap((power) => [1, 2, 5].map((each) => each * 10 ** power));

// Six digits: an axis of values that differ in their last bits alone would have ticks without end.
const smoothed = (values, share, mean = null) => values.map(
  (value) => value == null ? null : +(mean = share * (mean ?? value) + (1 - share) * value).toPrecision(6));

class Charts {
  constructor(ids) {
    [this.ids, this.data, this.plots, this.remarks] = [ids, new Map(ids.map((id) => [id, []])), new Map(), new Map()];
    on("smooth", "input", () => this.draw(false));
    for (const id of ["log-scale", "theme"]) on(id, "click", () => this.draw(true));
    const observer = new ResizeObserver(() => this.plots.forEach((plot, name) => plot.setSize(this.size(name))));
    for (const id of ["charts", "more-charts"]) observer.observe($(id));
  }

  add(id, news) {
    const records = this.data.get(id);
    if (news.restart) records.length = 0;
    records.push(...news.records);
    if (news.every > 1) this.remarks.set("", say("every", news.every));
    return news.restart || news.records.length > 0;
  }

  size(name) {
    return { width: $(`chart-${name}`).clientWidth || 300, height: 190 };
  }

  draw(again) {
    const names = new Set([...this.data.values()].flatMap((records) => records.flatMap(Object.keys)));
    names.delete("step");
    const place = (name) => FIRST.includes(name) ? FIRST.indexOf(name) : FIRST.length + name.includes("/");
    $("charts-part").hidden = !names.size;
    [...names].sort((a, b) => place(a) - place(b) || a.localeCompare(b)).forEach((name, n) =>
      this.drawOne(name, again, names.size > 15 && n >= 12 ? "more-charts" : "charts", n));
    $("remarks").textContent = [...this.remarks.values()].slice(0, 3).join("; ");
    $("more").hidden = names.size <= 15;
    $("more").firstElementChild.textContent = say("more_curves", names.size - 12);
  }

  drawOne(name, again, where, order) {
    const share = +$("smooth").value;
    const tables = this.ids.map((id) => {
      const records = this.data.get(id).filter((record) => name in record);
      const missing = records.find((record) => record[name] === null);
      if (missing) this.remarks.set(`${id}: ${name}`, say("no_number", `${id}: ${name}`, missing.step));
      return [records.map((record) => record.step), smoothed(records.map((record) => record[name]), share)];
    });
    const data = uPlot.join(tables);
    const [id, old] = [`chart-${name}`, this.plots.get(name)];
    if (!$(id)) $(where).append(div("card", h("h3", {}, name), h("div", { id })));
    $(id).parentNode.style.order = order; // a curve may begin when later ones are drawn already
    if (old && !again) return old.setData(data);
    old?.destroy();
    this.plots.set(name, new uPlot({ ...this.size(name), ...this.look(tables, data) }, data, $(id)));
  }

  look(tables, data) {
    const positive = data.slice(1).flat().every((value) => value == null || value > 0);
    const [ink, line] = [getComputedStyle($("remarks")).color, getComputedStyle($("log")).borderTopColor];
    const axis = { stroke: ink, grid: { stroke: line, width: 1 }, ticks: { stroke: line, width: 1 } };
    const wide = (plot, ticks) => Math.max(62, 18 + 8 * Math.max(...(ticks ?? [""]).map((each) => each.length)));
    // A null is a gap in a curve; a step that only other runs have is none.
    const series = this.ids.map((label, n) => ({ label, stroke: COLOURS[n % COLOURS.length], width: 1.6,
      value: (plot, each) => number(each), points: { show: tables[n][0].length < 3 } }));
    return {
      series: [{ label: T.step }, ...series],
      axes: [{ ...axis, size: 30, incrs: STEPS }, { ...axis, size: wide, values: (plot, ticks) => ticks.map(tick) }],
      scales: { x: { time: false }, y: { distr: $("log-scale").checked && positive ? 3 : 1 } },
      legend: { show: this.ids.length > 1 }, cursor: { sync: { key: "step" } },
    };
  }
}

function runPage() {
  const ids = $("run").dataset.ids.split(",");
  const charts = new Charts(ids);
  const marks = new Map(ids.map((id) => [id, { metrics: "", log: 0 }]));
  let shown = "";
  poll(async () => {
    let changed = false;
    for (const [id, mark] of marks) {
      const said = await api(`runs/${id}?metrics=${encodeURIComponent(mark.metrics)}&log=${mark.log}`, null, true);
      if (!said) continue;
      mark.metrics = said.metrics.mark;
      changed = charts.add(id, said.metrics) || changed;
      if (ids.length === 1) [showRun(said, mark.log), mark.log = said.log.offset];
    }
    if (changed) charts.draw(false);
  });

  function showRun({ run, log, results, samples }, offset) {
    if (shown !== run.state) {
      shown = run.state;
      put("state", badge(run));
      const link = (href, text) => h("a", { class: "button quiet", href }, text);
      const uses = run.command !== "train" || run.state === "running" ? [] : [
        link(`/new?command=eval&run=${run.id}`, T.evaluate), link(`/new?command=export&run=${run.id}`, T.export),
        link(`/chat?run=${run.id}`, T.chat)];
      put("actions", uses, link(`/new?command=${run.command}&run=${run.id}&copy=1`, T.edit_copy), actionsOf(run, ""));
      $("words").textContent = run.words;
    }
    $("results").textContent = results;
    // What something else has started has no log here.
    [$("log-part").hidden, $("results-part").hidden, $("samples-part").hidden] = [!run.words, !results, !samples[0]];
    const box = $("log");
    const atEnd = box.scrollTop + box.clientHeight >= box.scrollHeight - 8;
    if (log.offset < offset) box.textContent = "";
    box.append((log.skipped ? say("skipped", log.skipped) + "\n" : "") + log.text);
    if (log.text && atEnd) box.scrollTop = box.scrollHeight;
    const columns = [...new Set(samples.flatMap(Object.keys))];
    const text = (value) => value?.[0]?.role ? value.map(({ role, content }) => `${role}: ${text(content)}`).join("\n")
      : typeof value === "number" ? number(value) : typeof value === "string" ? value : JSON.stringify(value) ?? "";
    const row = (tag, cells) => h("tr", {}, cells.map((cell) => h(tag, {}, cell)));
    put("samples", h("thead", {}, row("th", columns)),
      h("tbody", {}, samples.map((sample) => row("td", columns.map((name) => text(sample[name]))))));
  }
}

// The text that the pages share, and where it comes from

async function withSource(changed) {
  const draft = (text) => sessionStorage.setItem("draft", text);
  const load = async (body) => {
    const said = await api("source", body);
    if (said) [$("yaml").value = said.yaml, draft(said.yaml), changed()];
  };
  on("source", "change", () => {
    const [kind, ...name] = $("source").value.split(":");
    if (kind) load({ [kind]: name.join(":") });
  });
  on("yaml", "input", () => [draft($("yaml").value), changed()]);
  $("yaml").value = sessionStorage.getItem("draft") ?? "";
  const [query, run] = [new URLSearchParams(location.search), new URLSearchParams(location.search).get("run")];
  if (run) [$("source").value = `run:${run}`, await load({ run, copy: query.has("copy") })];
  history.replaceState(null, "", location.href.replace(/[?&]run=.*/, "")); // to load it again would undo what is edited
}

function newPage() {
  const command = $("form").dataset.command;
  const fields = [...document.querySelectorAll(".field")];
  const input = (field) => field.querySelector("input, select");
  const own = () => $("own-output")?.checked ?? false;
  const asked = () => ({ yaml: $("yaml").value, command, name: $("name").value, own_output: own() });
  let [turn, later, last] = [0, null, Promise.resolve()];

  /** Checks the text, with a change of a key. One at a time: a change goes into the text that the one before left. */
  function show(change = {}) {
    const mine = ++turn;
    last = last.then(() => change.key || mine === turn ? showNow(change) : null);
  }

  async function showNow(change) {
    const sent = asked();
    const said = await api("form", { ...sent, ...change });
    if (!said) return;
    if (sent.yaml !== $("yaml").value) return change.key && showNow(change); // it was edited meanwhile
    if (said.yaml !== $("yaml").value) [$("yaml").value = said.yaml, sessionStorage.setItem("draft", said.yaml)];
    for (const field of fields) showField(field, said.values, said.problems[field.dataset.key] ?? []);
    const items = (lines) => lines.map((line) => h("li", {}, line));
    const problems = Object.values(said.problems).flat();
    put("problems", items(problems));
    put("notes", items(said.notes));
    $("notes-part").hidden = !said.notes.length;
    $("notes-part").firstElementChild.textContent = say("notes", said.notes.length);
    $("words").textContent = said.words.join(" ");
    $("start").disabled = problems.length > 0 || !said.yaml.trim();
    filter();
  }

  function showField(field, values, problems) {
    const [control, value] = [input(field), values?.[field.dataset.key] ?? ""];
    if (values) field.classList.toggle("given", field.dataset.key in values);
    if (values && control !== document.activeElement) {
      const same = [...(control.options ?? [])].find((option) => option.value.toLowerCase() === value.toLowerCase());
      if (control.options && !same) control.append(h("option", {}, value));
      control.value = same?.value ?? value;
    }
    [field.lastElementChild.textContent, field.lastElementChild.hidden] = [problems.join("\n"), !problems.length];
    control.setAttribute("aria-invalid", problems.length > 0);
  }

  function filter() {
    const [words, given] = [$("search").value.toLowerCase(), $("only-given").checked];
    for (const group of document.querySelectorAll(".group")) {
      const inside = [...group.querySelectorAll(".field")];
      for (const field of inside) field.hidden = (given && !field.classList.contains("given")) ||
        !field.textContent.toLowerCase().includes(words);
      group.querySelector(".count").textContent = group.querySelectorAll(".given").length || "";
      group.hidden = inside.every((field) => field.hidden);
      if ((words || given) && !group.hidden) group.open = true;
    }
  }

  for (const field of fields)
    input(field).addEventListener("change", ({ target }) => show({ key: field.dataset.key, value: target.value }));
  for (const id of ["search", "only-given"]) on(id, "input", filter);
  for (const id of ["name", "own-output"]) on(id, "input", () => show());
  onClick("start", async () => {
    const said = await last.then(() => api("start", asked())); // with the edit that has just been made
    if (said) location.href = `/run/${said.id}`;
  });
  withSource(() => [clearTimeout(later), later = setTimeout(show, 250)]).then(() => show());
}

// Data and plan

async function report(path, body) {
  const said = await api(path, { yaml: $("yaml").value, ...body });
  if (said) [$("report-part").hidden, $("report").textContent, $("words").textContent] = [false, said.text, said.words];
  return said;
}

function dataPage() {
  const token = ([text, trained, times]) => h("span", { class: `token ${trained ? "trained" : ""}` },
    text.replaceAll("\n", "↵\n") + (times > 1 ? ` × ${times}` : ""));
  const picture = (png) => h("img", { src: `data:image/png;base64,${png}`, alt: T.picture });
  const rest = (count) => count ? doc(say("left_out", count)) : null;
  const shown = (each) => [doc(each.sizes), h("p", {}, each.tokens.map(token)), rest(each.left_out),
    each.pictures.map(picture)];
  onClick("show", async () => {
    const said = await report("records", { first: +$("first").value, count: +$("count").value });
    if (said) put("records", (said.records ?? []).map((record) => div("card record",
      h("h3", {}, `${record.split} · ${record.where}`), doc(record.dropped), record.documents.flatMap(shown))));
  });
  withSource(() => {});
}

function planPage() {
  onClick("show", async () => {
    const search = $("search-layouts").checked ? "true" : "";
    const said = await report("plan", { gpu: $("gpu").value, gpus: $("gpus-count").value, search });
    if (said) showPlan(said.json);
  });
  withSource(() => {});

  function showPlan(plan) {
    if (!plan) return [put("verdict"), put("stages")];
    const fact = (value, name) => h("div", {}, h("b", {}, value), " ", h("span", { class: "quiet" }, name));
    const fits = h("b", { class: plan.fits ? "good" : "bad" }, plan.fits ? T.fits : T.fits_not);
    put("verdict", div("card verdict", fits, fact(`${number(plan.step_seconds)} s`, T.per_step),
      fact(Math.round(plan.tokens_per_second).toLocaleString(), T.tokens_per_second)));
    const kinds = [...new Set(plan.stages.flatMap((stage) => Object.keys(stage.bytes)))];
    const most = Math.max(...plan.stages.map((stage) => Math.max(stage.peak, stage.peak + stage.headroom)));
    const swatch = (kind, width, title) => h("span", { class: "swatch", title,
      style: { background: COLOURS[kinds.indexOf(kind) % COLOURS.length], width } });
    const part = ([kind, size]) => swatch(kind, `${100 * size / most}%`, `${kind}: ${sizeOf(size)}`);
    const row = ({ stage, bytes, peak, headroom }) => div("stage", `${T.stage} ${stage}`,
      div("stack", Object.entries(bytes).map(part)),
      h("span", { class: headroom < 0 ? "bad" : "quiet" }, `${sizeOf(peak)}, ${sizeOf(headroom)} ${T.free}`));
    put("stages", div("card", plan.stages.map(row), doc(kinds.flatMap((kind) => [swatch(kind, "10px", kind), kind]))));
  }
}

// Chat

let stopper = null; // ends the answers that come

const system = () => $("system").value ? [{ role: "system", content: $("system").value }] : [];

function toolsOf() {
  try {
    return JSON.parse($("tools").value || "[]");
  } catch (error) {
    toast(`${T.tools}: ${error.message}`);
    return null;
  }
}

async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  for (let text = ""; ;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (text + value).split("\n");
    text = lines.pop();
    for (const line of lines) if (line.startsWith("data: {")) yield JSON.parse(line.slice(6));
  }
}

class Pane {
  constructor(side) {
    [this.side, this.box, this.messages] = [side, h("div", { class: "pane", "aria-live": "polite" }), []];
  }

  /** Begins another conversation; an answer that still comes belongs to the one before. */
  clear = () => [this.messages, this.box.textContent] = [[], ""];

  server = () => $(this.side).value || (this.side === "left" && $("address").value);

  /** Asks the model of this side with further messages, and shows the answer as it comes. */
  async ask(messages, signal) {
    const [server, tools, said] = [this.server(), toolsOf(), this.messages];
    said.push(...messages);
    for (const message of messages) if (message.role === "user") this.showQuestion(message);
    const body = { messages: [...system(), ...said], stream: true, stream_options: { include_usage: true } };
    if (tools.length) body.tools = tools;
    for (const name of ["temperature", "max_tokens"]) if ($(name).value) body[name] = +$(name).value;
    if ($("thinking").value) body.enable_thinking = $("thinking").value === "true";
    const [answer, view] = [{ role: "assistant", content: "" }, this.view()];
    try {
      const response = await fetch("/api/chat", { ...post({ server, key: $("key").value, body }), signal });
      if (!response.ok) throw new Error((await response.json()).error.message);
      const start = performance.now();
      for await (const chunk of events(response.body)) this.take(chunk, answer, view, start);
    } catch (error) {
      view.foot.textContent = error.name === "AbortError" ? T.stopped : error.message;
      if (!answer.content) return [said.length -= messages.length, view.text.remove()];
    }
    view.text.hidden = !answer.content;
    said.push(answer);
    this.finish(view, answer, [...system(), ...said]);
  }

  take(chunk, answer, view, start) {
    if (chunk.error) throw new Error(chunk.error.message);
    const { content, reasoning_content, reasoning = reasoning_content, tool_calls } = chunk.choices?.[0]?.delta ?? {};
    if (reasoning) view.think(answer.reasoning_content = (answer.reasoning_content ?? "") + reasoning);
    if (content) view.text.textContent = answer.content += content;
    for (const { index, function: part, ...call } of tool_calls ?? []) // other servers send a call in pieces
      ((answer.tool_calls ??= [])[index] ??= { ...call, function: { ...part, arguments: "" } })
        .function.arguments += part.arguments ?? "";
    if (!chunk.usage) return;
    const [count, seconds] = [chunk.usage.completion_tokens, (performance.now() - start) / 1000];
    view.foot.textContent = `${count} tokens, ${(count / seconds).toFixed(1)} ${T.tokens_per_second}`;
  }

  showQuestion({ content }) {
    const parts = typeof content === "string" ? [{ text: content }] : content;
    const shown = parts.map((part) => part.text ?? h("img", { src: part.image_url.url, alt: T.picture }));
    this.box.append(div("message user", div("text", shown)));
  }

  view() {
    const [thought, text, foot] = [div("thought"), div("text"), doc()];
    const fold = h("details", { hidden: true }, h("summary", { class: "quiet" }, T.thought), thought);
    const box = div("message", fold, text, foot);
    this.box.append(box);
    box.scrollIntoView({ block: "nearest" });
    return { box, text, foot, think: (words) => [fold.hidden = false, thought.textContent = words] };
  }

  finish(view, answer, messages) {
    const results = (answer.tool_calls ?? []).map(({ id, function: call }) => {
      const label = say("result_of", call.name);
      const result = h("input", { "aria-label": label, placeholder: label });
      view.foot.before(div("call", h("b", {}, call.name), h("pre", {}, call.arguments), result));
      return () => ({ role: "tool", tool_call_id: id, content: result.value });
    });
    const send = button(T.send_results, "quiet small", () => mayAsk([this]) &&
      [send.remove(), ask([this], results.map((each) => each()))]);
    if (results.length) view.foot.before(send);
    view.foot.append(" ", button(T.save_sample, "quiet small", async () => {
      const said = await api("sample", { messages, tools: toolsOf() ?? [] });
      if (said) toast(say("saved", said.path, said.count));
    }));
  }
}

/** Whether panes can be asked now; the user is told what is missing. */
const mayAsk = (panes) => !stopper && toolsOf() && (panes.every((pane) => pane.server()) || toast(T.no_server));

async function ask(panes, messages) {
  [stopper, $("cancel").hidden, $("send").disabled] = [new AbortController(), false, true];
  await Promise.all(panes.map((pane) => pane.ask(messages, stopper.signal)));
  [stopper, $("cancel").hidden, $("send").disabled] = [null, true, false];
}

function chatPage() {
  const [panes, pictures] = [[new Pane("left"), new Pane("right")], []];
  put("panes", panes[0].box);
  const image = (src) => h("img", { src, alt: T.picture });
  const fill = (id, options, first) => {
    if ($(id) === document.activeElement) return;
    const value = $(id).value;
    put(id, [["", first], ...options].map(([name, text]) => h("option", { value: name }, text)));
    $(id).value = options.some(([name]) => name === value) ? value : "";
  };
  poll(async () => {
    const runs = (await api("runs", null, true))?.runs ?? [];
    const serves = runs.filter((run) => run.command === "server" && run.state === "running");
    const trained = runs.filter((run) => run.command === "train" && run.words);
    const servers = serves.map((run) => [run.id, run.address ? run.id : `${run.id} ${T.is_loading}`]);
    for (const side of ["left", "right"]) fill(side, servers, T.none);
    if (!$("left").value && servers.length && !$("address").value) $("left").value = servers[0][0];
    fill("serve", trained.flatMap(({ id }) => [[id, id], [`base ${id}`, `${T.base_of} ${id}`]]), T.pick);
  });
  const serve = async (name, isAsked) => {
    const [run, base] = [name.replace(/^base /, ""), name.startsWith("base ")];
    const source = await api("source", { run, base });
    const server = `${base ? "base" : "serve"}-${run}`.slice(0, 60);
    const said = source && await api("start", { yaml: source.yaml, command: "server", name: server });
    if (said) toast(`${said.id} ${T.is_loading}`);
    if (said && isAsked) [$("left").append(h("option", {}, said.id)), $("left").value = said.id];
    $("serve").value = "";
  };
  on("serve", "change", () => $("serve").value && serve($("serve").value));
  const asked = new URLSearchParams(location.search).get("run");
  if (asked) [history.replaceState(null, "", "/chat"), serve(asked, true)];
  on("right", "change", () => put("panes", panes[0].box, $("right").value ? panes[1].box : []));
  on("clear", "click", () => [stopper?.abort(), panes.forEach((pane) => pane.clear())]);
  on("cancel", "click", () => stopper?.abort());
  on("picture", "change", () => [...$("picture").files].forEach((file) => {
    const reader = new FileReader();
    reader.onload = () => pictures.push(reader.result) && put("pictures", pictures.map(image));
    reader.readAsDataURL(file);
  }));
  on("question", "keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    $("ask").requestSubmit();
  });
  on("ask", "submit", async (event) => {
    event.preventDefault();
    const [text, asked] = [$("question").value.trim(), panes.filter((pane) => pane.box.isConnected)];
    if (!text || !mayAsk(asked)) return;
    const images = pictures.map((url) => ({ type: "image_url", image_url: { url } }));
    const content = images.length ? [...images, { type: "text", text }] : text;
    [$("question").value, $("picture").value, pictures.length] = ["", "", 0];
    put("pictures");
    await ask(asked, [{ role: "user", content }]);
  });
}

function loginPage() {
  on("login", "submit", async (event) => {
    event.preventDefault();
    const answer = await fetch("/login", post({ key: $("login-key").value }));
    if (answer.ok) location.href = "/";
    $("wrong").hidden = answer.ok;
  });
}

const keep = (name, value) => document.cookie = `${name}=${value}; path=/; max-age=31536000; samesite=strict`;

on("language", "click", () => [keep("language", root.lang === "en" ? "zh" : "en"), location.reload()]);
on("theme", "click", () => {
  const theme = root.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  keep("theme", root.dataset.theme = theme === "dark" ? "light" : "dark");
});
const PAGES = { runsPage, runPage, newPage, dataPage, planPage, chatPage, loginPage };
PAGES[`${document.body.dataset.page}Page`]?.();
root.dataset.ready = "";
