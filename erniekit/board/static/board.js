// The pages of the board. Whatever comes from files, models or users is put in as text, never as HTML.

const T = JSON.parse(document.getElementById("strings").textContent);
const $ = (id) => document.getElementById(id);
const say = (name, ...values) => values.reduce((text, value, n) => text.replace(`{${n}}`, value), T[name] ?? name);

/** An element: h("a", {href, class, onclick}, children...). */
function h(tag, props = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "style") Object.assign(element.style, value);
    else if (value === true || value === false) element[name] = value;
    else if (value != null) element.setAttribute(name, value);
  }
  element.append(...children.flat().filter((child) => child != null));
  return element;
}

function toast(text) {
  const box = h("div", { class: "toast" }, text);
  $("toasts").append(box);
  setTimeout(() => box.remove(), 8000);
}

/** The JSON answer to a request; null, with a message to the user, where it fails. */
async function api(path, body, quiet = false) {
  try {
    const headers = { "Content-Type": "application/json" };
    const answer = await fetch(`/api/${path}`, body ? { method: "POST", headers, body: JSON.stringify(body) } : {});
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

async function busy(button, act) {
  const text = button.textContent;
  button.disabled = true;
  button.textContent = T.loading;
  try {
    return await act();
  } finally {
    button.disabled = false;
    button.textContent = text;
  }
}

const badge = (state) => h("span", { class: `badge ${state}` }, say(state));
const number = (value) => value == null ? "" : Math.abs(value) >= 1e4 || (value && Math.abs(value) < 1e-3) ? value.toExponential(2) : String(+value.toPrecision(5));
const draft = (text) => text === undefined ? sessionStorage.getItem("draft") ?? "" : sessionStorage.setItem("draft", text);

// The list of runs

function actionsOf(run, small) {
  const button = (text, act, kind = "quiet") => h("button", { class: `${kind} ${small ? "small" : ""}`, onclick: act }, text);
  if (run.state === "running") {
    const stop = (force) => async () => {
      if (force && !confirm(T.kill_hint)) return;
      if (await api("stop", { run: run.id, force })) toast(force ? say("killed") : T.stopping);
    };
    return [button(T.stop, stop(false)), ...(small ? [] : [button(T.kill, stop(true), "danger")])];
  }
  const [label, trains] = run.command === "train" ? [T.again, true] : [T.repeat, false];
  return run.state === "other" || (trains && run.state === "done") ? [] : [button(label, () => api("again", { run: run.id }))];
}

function runsPage() {
  const chosen = new Set();
  poll(async () => {
    const said = await api("runs", null, true);
    if (!said) return;
    $("empty").hidden = said.runs.length > 0;
    $("runs").hidden = !said.runs.length;
    const rows = said.runs.map((run) => h("tr", { "data-run": run.id },
      h("td", {}, h("input", { type: "checkbox", "aria-label": `${T.compare} ${run.id}`, checked: chosen.has(run.id), onchange: (event) => {
        chosen[event.target.checked ? "add" : "delete"](run.id);
        $("compare").hidden = chosen.size < 2;
        $("compare").href = `/compare?runs=${[...chosen].join(",")}`;
      } })),
      h("td", {}, h("a", { href: `/run/${run.id}` }, run.id)), h("td", {}, run.command), h("td", {}, badge(run.state)),
      h("td", { class: "num" }, number(run.last.step)), h("td", { class: "num" }, number(run.last.loss)),
      h("td", { class: "quiet" }, new Date(run.created * 1000).toLocaleString(document.documentElement.lang)),
      h("td", { class: "num" }, actionsOf(run, true))));
    if (!$("runs").contains(document.activeElement)) $("runs").tBodies[0].replaceChildren(...rows);
  });
}

// One run, or several to compare

const COLOURS = ["#3b6fe0", "#e0733b", "#2a9d6f", "#a04fd0", "#d0457e", "#8a7a2e", "#2f9fc0", "#777"];
const FIRST = ["loss", "eval_loss", "learning_rate", "grad_norm", "tokens_per_second"];

function smoothed(values, share) {
  let mean = null;
  return values.map((value) => value == null ? null : (mean = mean == null ? value : share * mean + (1 - share) * value));
}

class Charts {
  constructor(ids) {
    [this.ids, this.data, this.plots] = [ids, new Map(ids.map((id) => [id, []])), new Map()];
    for (const id of ["smooth", "log-scale"]) $(id).addEventListener("input", () => this.draw(id === "log-scale"));
    new ResizeObserver(() => this.plots.forEach((plot, name) => plot.setSize(this.size(name)))).observe($("charts"));
  }

  add(id, news) {
    const records = this.data.get(id);
    if (news.restart) records.length = 0;
    records.push(...news.records);
    if (news.every > 1) $("remarks").textContent = say("every", news.every);
    return news.restart || news.records.length > 0;
  }

  size(name) {
    return { width: $(`chart-${name}`).clientWidth, height: 190 };
  }

  draw(again) {
    const names = new Set([...this.data.values()].flatMap((records) => records.flatMap(Object.keys)));
    names.delete("step");
    const order = (name) => FIRST.includes(name) ? FIRST.indexOf(name) : FIRST.length;
    $("charts-part").hidden = !names.size;
    for (const name of [...names].sort((a, b) => order(a) - order(b) || a.localeCompare(b))) this.drawOne(name, again);
  }

  drawOne(name, again) {
    const share = +$("smooth").value;
    const tables = this.ids.map((id) => {
      const records = this.data.get(id).filter((record) => name in record);
      const missing = records.find((record) => record[name] === null);
      if (missing) $("remarks").textContent = say("no_number", `${id}: ${name}`, missing.step);
      return [records.map((record) => record.step), smoothed(records.map((record) => record[name]), share)];
    });
    const data = uPlot.join(tables);
    const logs = $("log-scale").checked && data.slice(1).flat().every((value) => value == null || value > 0);
    const old = this.plots.get(name);
    if (old && !again) return old.setData(data);
    old?.destroy();
    let box = $(`chart-${name}`);
    if (!box) $("charts").append(h("div", { class: "card" }, h("h3", {}, name), box = h("div", { id: `chart-${name}` })));
    const style = getComputedStyle(document.documentElement);
    const [ink, line] = ["--quiet", "--line"].map((each) => style.getPropertyValue(each));
    const axis = { stroke: ink, grid: { stroke: line, width: 1 }, ticks: { stroke: line, width: 1 } };
    const series = this.ids.map((id, n) => ({ label: id, stroke: COLOURS[n % COLOURS.length], width: 1.6, spanGaps: true,
      points: { show: tables[n][0].length < 3 }, value: (plot, value) => number(value) }));
    this.plots.set(name, new uPlot({ ...this.size(name), series: [{ label: T.step }, ...series], cursor: { sync: { key: "step" } },
      scales: { x: { time: false }, y: { distr: logs ? 3 : 1 } }, legend: { show: this.ids.length > 1 },
      axes: [{ ...axis, size: 30 }, { ...axis, size: 62, values: (plot, ticks) => ticks.map((tick) => tick == null ? "" : number(tick)) }] }, data, box));
  }
}

function runPage() {
  const ids = $("run").dataset.ids.split(",");
  const charts = new Charts(ids);
  const marks = new Map(ids.map((id) => [id, { metrics: "", log: 0 }]));
  let shown = "";
  poll(async () => {
    let changed = false;
    for (const id of ids) {
      const mark = marks.get(id);
      const said = await api(`runs/${id}?metrics=${encodeURIComponent(mark.metrics)}&log=${mark.log}`, null, true);
      if (!said) continue;
      mark.metrics = said.metrics.mark;
      changed = charts.add(id, said.metrics) || changed;
      if (ids.length === 1) [showRun(said, mark.log), mark.log = said.log.offset];
    }
    if (changed) charts.draw(false);
  });

  function showRun({ run, log, results, samples }, offset) {
    const state = `${run.state} ${run.code ?? ""}`;
    if (state !== shown) {
      shown = state;
      $("state").replaceChildren(badge(run.state));
      const link = (href, text) => h("a", { class: "button quiet", href }, text);
      const uses = run.command !== "train" ? [] : [link(`/new?command=eval&run=${run.id}`, T.evaluate),
        link(`/new?command=export&run=${run.id}`, T.export), link(`/chat?run=${run.id}`, T.chat)];
      const copy = link(`/new?command=${run.command}&run=${run.id}&copy=1`, T.edit_copy);
      $("actions").replaceChildren(...(run.state === "running" ? [] : uses), copy, ...actionsOf(run, false));
      $("words").textContent = run.words;
    }
    $("log-part").hidden = false;
    const box = $("log");
    const atEnd = box.scrollTop + box.clientHeight >= box.scrollHeight - 8;
    if (log.offset < offset) box.textContent = "";
    box.append((log.skipped ? say("skipped", log.skipped) + "\n" : "") + log.text);
    if (log.text && atEnd) box.scrollTop = box.scrollHeight;
    $("results-part").hidden = !results;
    $("results").textContent = results;
    $("samples-part").hidden = !samples.length;
    const columns = [...new Set(samples.flatMap(Object.keys))];
    const text = (value) => value == null ? "" : typeof value === "object" ? JSON.stringify(value) : String(value);
    if (samples.length) $("samples").replaceChildren(h("thead", {}, h("tr", {}, columns.map((name) => h("th", {}, name)))),
      h("tbody", {}, samples.map((row) => h("tr", {}, columns.map((name) => h("td", {}, text(row[name])))))));
  }
}

// The text that the pages share, and where it comes from

async function withSource(changed) {
  const box = $("yaml");
  const load = async (body) => {
    const said = await api("source", body);
    if (said) [box.value = said.yaml, draft(said.yaml), changed()];
  };
  $("source").addEventListener("change", () => {
    const [kind, name] = [$("source").value.split(":", 1)[0], $("source").value.replace(/^\w+:/, "")];
    if (name) load({ [kind]: name });
  });
  box.addEventListener("input", () => [draft(box.value), changed()]);
  box.value = draft();
  const query = new URLSearchParams(location.search);
  if (query.has("run")) [$("source").value = `run:${query.get("run")}`, await load({ run: query.get("run"), copy: query.has("copy") })];
}

function formPage() {
  const command = $("form").dataset.command;
  const fields = [...document.querySelectorAll(".field")];
  const input = (field) => field.querySelector("input, select");
  let turn = 0;

  async function show(change = {}) {
    const mine = ++turn;
    const said = await api("form", { yaml: $("yaml").value, command, name: $("name").value,
      own_output: $("own-output")?.checked ?? false, ...change });
    if (!said || mine !== turn) return;
    if (said.yaml !== $("yaml").value) [$("yaml").value = said.yaml, draft(said.yaml)];
    for (const field of fields) {
      const [key, control] = [field.dataset.key, input(field)];
      const value = said.values?.[key] ?? "";
      if (said.values && control !== document.activeElement) {
        if (control.tagName === "SELECT") {
          const same = [...control.options].find((option) => option.value.toLowerCase() === value.toLowerCase());
          control.value = (same ?? control.appendChild(h("option", {}, value))).value;
        } else control.value = value;
      }
      if (said.values) field.classList.toggle("given", key in said.values);
      const lines = said.problems[key] ?? [];
      field.lastElementChild.textContent = lines.join("\n");
      field.lastElementChild.hidden = !lines.length;
      control.setAttribute("aria-invalid", lines.length > 0);
    }
    const lines = Object.values(said.problems).flat();
    $("problems").replaceChildren(...lines.map((line) => h("li", {}, line)));
    $("notes-part").hidden = !said.notes.length;
    $("notes-part").firstElementChild.textContent = say("notes", said.notes.length);
    $("notes").replaceChildren(...said.notes.map((line) => h("li", {}, line)));
    $("words").textContent = said.words.join(" ");
    $("start").disabled = lines.length > 0 || !$("yaml").value.trim();
    filter();
  }

  function filter() {
    const words = $("search").value.toLowerCase();
    for (const group of document.querySelectorAll(".group")) {
      const inside = [...group.querySelectorAll(".field")];
      const given = inside.filter((field) => field.classList.contains("given"));
      for (const field of inside) field.hidden = ($("only-given").checked && !given.includes(field)) || !field.textContent.toLowerCase().includes(words);
      group.querySelector(".count").textContent = given.length || "";
      group.hidden = inside.every((field) => field.hidden);
      if ((words || $("only-given").checked) && !group.hidden) group.open = true;
    }
  }

  let later;
  for (const field of fields) input(field).addEventListener("change", () => show({ key: field.dataset.key, value: input(field).value }));
  for (const id of ["search", "only-given"]) $(id).addEventListener("input", filter);
  for (const id of ["name", "own-output"]) $(id)?.addEventListener("input", () => show());
  $("start").addEventListener("click", () => busy($("start"), async () => {
    const said = await api("start", { yaml: $("yaml").value, command, name: $("name").value, own_output: $("own-output")?.checked ?? false });
    if (said) location.href = `/run/${said.id}`;
  }));
  withSource(() => [clearTimeout(later), later = setTimeout(show, 250)]).then(() => show());
}

// Data and plan

const report = (said) => [$("report-part").hidden = false, $("report").textContent = said.text, $("words").textContent = said.words];

function dataPage() {
  const token = ([text, trained, times]) => h("span", { class: `token ${trained ? "trained" : ""}` }, text.replaceAll("\n", "↵\n") + (times > 1 ? ` × ${times}` : ""));
  $("show").addEventListener("click", () => busy($("show"), async () => {
    const said = await api("records", { yaml: $("yaml").value, first: +$("first").value, count: +$("count").value });
    if (!said) return;
    $("records").replaceChildren(...(said.records ?? []).flatMap((record) => {
      const head = h("h3", {}, `${record.split} · ${record.where}`);
      if (!record.documents.length) return h("div", { class: "card record" }, head, h("p", { class: "doc" }, record.dropped));
      return record.documents.map((each) => h("div", { class: "card record" }, head.cloneNode(true), h("p", { class: "doc" }, each.sizes),
        h("p", {}, each.tokens.map(token)), each.left_out ? h("p", { class: "doc" }, say("left_out", each.left_out)) : null,
        each.pictures.map((png) => h("img", { src: `data:image/png;base64,${png}`, alt: record.where }))));
    }));
    report(said);
  }));
  withSource(() => {});
}

function planPage() {
  const size = (bytes) => bytes >= 1e9 ? `${(bytes / 1e9).toFixed(1)} GB` : `${(bytes / 1e6).toFixed(0)} MB`;
  $("show").addEventListener("click", () => busy($("show"), async () => {
    const said = await api("plan", { yaml: $("yaml").value, gpu: $("gpu").value, gpus: $("gpus-count").value, search: $("search-layouts").checked ? "true" : "" });
    if (!said) return;
    report(said);
    const plan = said.json;
    const fact = (value, name) => h("div", {}, h("b", {}, value), " ", h("span", { class: "quiet" }, name));
    $("verdict").replaceChildren(...(plan ? [h("div", { class: "card verdict" }, h("b", { class: plan.fits ? "good" : "bad" }, plan.fits ? T.fits : T.fits_not),
      fact(`${number(plan.step_seconds)} s`, T.per_step), fact(Math.round(plan.tokens_per_second).toLocaleString(), T.tokens_per_second))] : []));
    const kinds = [...new Set((plan?.stages ?? []).flatMap((stage) => Object.keys(stage.bytes)))];
    const most = Math.max(...(plan?.stages ?? []).map((stage) => Math.max(stage.peak, stage.peak + stage.headroom)));
    const colour = (kind) => COLOURS[kinds.indexOf(kind) % COLOURS.length];
    const stages = (plan?.stages ?? []).map((stage) => h("div", { class: "stage" }, h("span", {}, `${T.stage} ${stage.stage}`),
      h("div", { class: "stack" }, kinds.map((kind) => h("span", { title: `${kind}: ${size(stage.bytes[kind] ?? 0)}`,
        style: { background: colour(kind), width: `${100 * (stage.bytes[kind] ?? 0) / most}%` } }))),
      h("span", { class: stage.headroom < 0 ? "bad" : "quiet" }, `${size(stage.peak)}, ${size(stage.headroom)} ${T.free}`)));
    const key = kinds.flatMap((kind) => [h("span", { class: "swatch", style: { background: colour(kind) } }), kind]);
    $("stages").replaceChildren(...(stages.length ? [h("div", { class: "card" }, stages, h("p", { class: "doc" }, key))] : []));
  }));
  withSource(() => {});
}

// Chat

class Pane {
  constructor(side) {
    [this.side, this.box, this.messages] = [side, h("div", { class: "pane", "aria-live": "polite" }), []];
  }

  clear() {
    [this.messages, this.box.textContent] = [[], ""];
  }

  async ask(messages, signal) {
    const server = $(this.side).value || (this.side === "left" && $("address").value);
    if (!server) return toast(T.no_server);
    this.messages.push(...messages);
    for (const message of messages) if (message.role === "user") {
      const parts = typeof message.content === "string" ? [{ text: message.content }] : message.content;
      this.box.append(h("div", { class: "message user" }, h("div", { class: "text" }, parts.map((part) => part.text ??
        h("img", { src: part.image_url.url, alt: T.picture })))));
    }
    const body = { messages: [...($("system").value ? [{ role: "system", content: $("system").value }] : []), ...this.messages], stream: true, stream_options: { include_usage: true } };
    for (const [id, name] of [["temperature", "temperature"], ["max-tokens", "max_tokens"]]) if ($(id).value) body[name] = +$(id).value;
    if ($("thinking").value) body.enable_thinking = $("thinking").value === "true";
    const tools = toolsOf();
    if (tools === null) return;
    if (tools.length) body.tools = tools;
    const view = this.view();
    const answer = { role: "assistant", content: "" };
    const start = performance.now();
    try {
      const response = await fetch("/api/chat", { method: "POST", signal, headers: { "Content-Type": "application/json" },
        body: JSON.stringify({ server, key: $("key").value, body }) });
      if (!response.ok) throw new Error((await response.json()).error.message);
      for await (const chunk of events(response.body)) {
        if (chunk.error) throw new Error(chunk.error.message);
        const delta = chunk.choices[0]?.delta ?? {};
        if (delta.reasoning) view.think(answer.reasoning_content = (answer.reasoning_content ?? "") + delta.reasoning);
        if (delta.content) view.text.textContent = answer.content += delta.content;
        if (delta.tool_calls) answer.tool_calls = [...(answer.tool_calls ?? []), ...delta.tool_calls.map(({ index, ...call }) => call)];
        if (chunk.usage) view.foot.textContent = `${chunk.usage.completion_tokens} tokens, ${number(1000 * chunk.usage.completion_tokens / (performance.now() - start))} ${T.tokens_per_second}`;
      }
    } catch (error) {
      view.foot.textContent = error.name === "AbortError" ? T.stopped : String(error.message);
      if (!answer.content) return [this.messages.length -= messages.length, view.text.remove()];
    }
    view.text.hidden = !answer.content;
    this.messages.push(answer);
    this.finish(view, answer);
  }

  view() {
    const view = { thought: h("div", { class: "thought" }), text: h("div", { class: "text" }), foot: h("p", { class: "doc" }) };
    const fold = h("details", { hidden: true }, h("summary", { class: "quiet" }, T.thought), view.thought);
    view.think = (text) => [fold.hidden = false, view.thought.textContent = text];
    view.root = h("div", { class: "message" }, fold, view.text, view.foot);
    this.box.append(view.root);
    view.root.scrollIntoView({ block: "nearest" });
    return view;
  }

  finish(view, answer) {
    const results = (answer.tool_calls ?? []).map((call) => {
      const result = h("input", { "aria-label": say("result_of", call.function.name), placeholder: say("result_of", call.function.name) });
      view.foot.before(h("div", { class: "call" }, h("b", {}, call.function.name), h("pre", {}, call.function.arguments), result));
      return () => ({ role: "tool", tool_call_id: call.id, content: result.value });
    });
    const send = h("button", { class: "quiet small", onclick: () => [send.remove(), this.ask(results.map((result) => result()))] }, T.send_results);
    if (results.length) view.foot.before(send);
    const history = [...this.messages];
    view.root.append(h("button", { class: "quiet small", onclick: async () => {
      const system = $("system").value ? [{ role: "system", content: $("system").value }] : [];
      const said = await api("sample", { messages: [...system, ...history], tools: toolsOf() ?? [] });
      if (said) toast(say("saved", said.path, said.count));
    } }, T.save_sample));
  }
}

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
    for (const line of lines) if (line.startsWith("data: ") && line !== "data: [DONE]") yield JSON.parse(line.slice(6));
  }
}

function chatPage() {
  const panes = [new Pane("left"), new Pane("right")];
  let pictures = [], stopper = null;
  $("panes").append(panes[0].box);
  const fill = (box, options, first) => {
    const value = box.value;
    box.replaceChildren(h("option", { value: "" }, first), ...options.map(([id, text]) => h("option", { value: id }, text)));
    box.value = options.some(([id]) => id === value) ? value : "";
  };
  poll(async () => {
    const runs = (await api("runs", null, true))?.runs ?? [];
    const served = runs.filter((run) => run.command === "server" && run.state === "running").map((run) => [run.id, run.address ? run.id : `${run.id} ${T.is_loading}`]);
    for (const side of ["left", "right"]) if ($(side) !== document.activeElement) fill($(side), served, T.none);
    if (!$("left").value && served.length && !$("address").value) $("left").value = served[0][0];
    const trained = runs.filter((run) => run.command === "train" && run.words);
    if ($("serve") !== document.activeElement) fill($("serve"), trained.flatMap((run) => [[run.id, run.id], [`base ${run.id}`, `${T.base_of} ${run.id}`]]), T.pick);
  });
  const serve = async (name) => {
    const base = name.startsWith("base ");
    const run = base ? name.slice(5) : name;
    const source = await api("source", { run, base });
    const said = source && await api("start", { yaml: source.yaml, command: "server", name: `${base ? "base" : "serve"}-${run}`.slice(0, 60) });
    if (said) toast(`${said.id} ${T.is_loading}`);
    $("serve").value = "";
  };
  $("serve").addEventListener("change", () => $("serve").value && serve($("serve").value));
  const asked = new URLSearchParams(location.search).get("run");
  if (asked) [history.replaceState(null, "", "/chat"), serve(asked)];
  $("right").addEventListener("change", () => $("right").value ? $("panes").append(panes[1].box) : panes[1].box.remove());
  $("clear").addEventListener("click", () => panes.forEach((pane) => pane.clear()));
  $("cancel").addEventListener("click", () => stopper?.abort());
  $("picture").addEventListener("change", async () => {
    for (const file of $("picture").files) pictures.push(await new Promise((resolve) => {
      const reader = Object.assign(new FileReader(), { onload: () => resolve(reader.result) });
      reader.readAsDataURL(file);
    }));
    $("picture").value = "";
    $("pictures").replaceChildren(...pictures.map((src) => h("img", { src, alt: T.picture })));
  });
  $("question").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) [event.preventDefault(), $("ask").requestSubmit()];
  });
  $("ask").addEventListener("submit", async (event) => {
    event.preventDefault();
    const text = $("question").value.trim();
    if (!text || stopper) return;
    const content = pictures.length ? [...pictures.map((url) => ({ type: "image_url", image_url: { url } })), { type: "text", text }] : text;
    [$("question").value, pictures, stopper] = ["", [], new AbortController()];
    [$("pictures").textContent, $("cancel").hidden, $("send").disabled] = ["", false, true];
    const sides = panes.filter((pane) => pane.box.isConnected);
    await Promise.all(sides.map((pane) => pane.ask([{ role: "user", content }], stopper.signal)));
    [stopper, $("cancel").hidden, $("send").disabled] = [null, true, false];
  });
}

function loginPage() {
  $("login").addEventListener("submit", async (event) => {
    event.preventDefault();
    const body = JSON.stringify({ key: $("login-key").value });
    const answer = await fetch("/login", { method: "POST", headers: { "Content-Type": "application/json" }, body });
    if (answer.ok) location.href = "/";
    else $("wrong").hidden = false;
  });
}

const keep = (name, value) => document.cookie = `${name}=${value}; path=/; max-age=31536000; samesite=strict`;
$("language")?.addEventListener("click", () => [keep("language", document.documentElement.lang === "en" ? "zh" : "en"), location.reload()]);
$("theme")?.addEventListener("click", () => {
  const dark = document.documentElement.dataset.theme === "dark" || (!document.documentElement.dataset.theme && matchMedia("(prefers-color-scheme: dark)").matches);
  [keep("theme", dark ? "light" : "dark"), location.reload()];
});
const PAGES = { runs: runsPage, run: runPage, new: formPage, data: dataPage, plan: planPage, chat: chatPage, login: loginPage };
PAGES[document.body.dataset.page]?.();
