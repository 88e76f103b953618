// The scripts of the site's own pages: show a name's values, fold and unfold code, replay a run, compare bits. No libraries, no network.
(() => {
  "use strict";

  // ---- a name's values
  const held = document.createElement("div");
  held.id = "held";
  held.hidden = true;
  document.body.append(held);

  function show(target) {
    held.textContent = target.dataset.held;
    held.hidden = false;
    const box = target.getBoundingClientRect();
    const width = held.offsetWidth;
    const left = Math.max(8, Math.min(box.left, document.documentElement.clientWidth - width - 8));
    held.style.left = `${left + window.scrollX}px`;
    held.style.top = `${box.bottom + 4 + window.scrollY}px`;
  }
  const hide = () => { held.hidden = true; };
  const named = (event) => event.target.closest && event.target.closest(".live");
  document.addEventListener("mouseover", (event) => { const name = named(event); name ? show(name) : hide(); });
  document.addEventListener("focusin", (event) => { const name = named(event); if (name) show(name); });
  document.addEventListener("focusout", hide);

  // ---- fold and unfold
  for (const button of document.querySelectorAll(".fold-all button")) {
    button.addEventListener("click", () => {
      const open = button.dataset.open === "true";
      for (const each of document.querySelectorAll(".hunk details")) each.open = open;
    });
  }
  const data = document.getElementById("replay-data");
  if (data) replay(document.getElementById("replay"), JSON.parse(data.textContent));

  const recorded = document.getElementById("bits-data");
  if (recorded) bits(document.getElementById("bits"), JSON.parse(recorded.textContent));

  // ---- one request's numbers, beside others
  function bits(root, numbers) {
    const ways = { fastest: "exact off", exact: "exact on" };
    const counts = Object.keys(numbers.exact).map(Number).sort((a, b) => a - b);
    root.innerHTML = `<div class="controls"><input type="range" min="0" max="${counts.length - 1}" value="0" aria-label="other requests"><span><output></output></span></div>
      <div class="ways"></div>`;
    const slider = root.querySelector("input"), output = root.querySelector("output"), tables = root.querySelector(".ways");
    const cell = (row, text, kind) => {
      const added = row.insertCell();
      added.textContent = text;
      if (kind) added.className = kind;
    };
    // Each digit that is not the one of the request alone is marked.
    const digits = (row, value, alone) => {
      const added = row.insertCell();
      for (const [index, digit] of [...value].entries()) {
        const part = document.createElement(digit === alone[index] ? "span" : "mark");
        part.textContent = digit;
        added.append(part);
      }
    };
    function draw() {
      const count = counts[slider.value];
      output.textContent = count === 0 ? "alone" : count === 1 ? "beside 1 other request" : `beside ${count} other requests`;
      tables.replaceChildren(...Object.entries(ways).map(([way, label]) => {
        const rows = numbers[way][count], alone = Object.fromEntries(numbers[way][0].map((each) => [each.token, each.bits]));
        const seen = new Set(counts.filter((each) => each <= count).map((each) => numbers[way][each].map((token) => token.bits).join()));
        const section = document.createElement("section"), head = document.createElement("h3"), table = document.createElement("table");
        head.textContent = label;
        table.className = "numbers";
        for (const each of rows) {
          const row = table.insertRow();
          cell(row, JSON.stringify(each.token), "token");
          cell(row, each.logprob.toPrecision(9), "number");
          digits(row, each.bits, alone[each.token] || "");
        }
        const told = document.createElement("p");
        told.textContent = `${seen.size} ${seen.size === 1 ? "kind" : "kinds"} of numbers so far`;
        section.append(head, table, told);
        return section;
      }));
    }
    slider.addEventListener("input", draw);
    draw();
  }

  // ---- a run, replayed
  function replay(root, traces) {
    const names = Object.keys(traces);
    const last = Math.max(...names.map((name) => traces[name].passes.length));
    root.innerHTML = `<div class="controls"><button type="button">play</button>
      <input type="range" min="0" max="${last}" value="${last}" aria-label="forward passes"><span>forward pass <output>${last}</output> of ${last}</span></div>`;
    const [button, slider, output] = ["button", "input", "output"].map((tag) => root.querySelector(tag));
    const lanes = names.map((name) => lane(root, name, traces[name], last));
    let timer = null;

    function draw() {
      const now = Number(slider.value);
      output.textContent = now;
      for (const each of lanes) each(now);
    }
    function stop() {
      clearInterval(timer);
      timer = null;
      button.textContent = "play";
    }
    button.addEventListener("click", () => {
      if (timer) return stop();
      if (Number(slider.value) === last) slider.value = 0;
      button.textContent = "pause";
      timer = setInterval(() => {
        slider.value = Number(slider.value) + 1;
        draw();
        if (Number(slider.value) === last) stop();
      }, 120);
    });
    slider.addEventListener("input", () => { stop(); draw(); });
    window.addEventListener("resize", draw);
    draw();
  }

  // One chapter: its name, its figures so far, and a row for each request.
  function lane(root, name, trace, last) {
    const head = document.createElement("h3");
    head.innerHTML = `${name} <span class="told"></span>`;
    const canvas = document.createElement("canvas");
    root.append(head, canvas);
    const ended = trace.lengths.map((_, request) =>
      1 + trace.passes.findLastIndex((each) => each.parts.some((part) => part.request === request && part.got_token)));

    return (now) => {
      const passes = trace.passes.slice(0, now);
      const parts = passes.flatMap((each) => each.parts);
      const tokens = parts.filter((part) => part.got_token).length;
      const positions = parts.reduce((sum, part) => sum + part.num_tokens, 0);
      const wasted = positions - parts.reduce((sum, part) => sum + part.useful, 0);
      const done = ended.filter((end) => end <= now).length;
      head.querySelector(".told").textContent =
        `${tokens} tokens, ${positions} positions, ${wasted} of them for nothing; ${done} of ${trace.lengths.length} requests finished` +
        (now >= trace.passes.length ? ` after ${trace.passes.length} forward passes` : "");

      const rowHeight = 11, gap = 2, scale = window.devicePixelRatio || 1;
      const width = root.clientWidth, height = trace.lengths.length * rowHeight;
      canvas.width = width * scale;
      canvas.height = height * scale;
      canvas.style.height = `${height}px`;
      const color = (kind) => getComputedStyle(document.body).getPropertyValue(`--book-${kind}`).trim();
      const colors = Object.fromEntries(["token", "prompt", "waste", "wait"].map((kind) => [kind, color(kind)]));
      const pen = canvas.getContext("2d");
      pen.scale(scale, scale);
      const step = width / last;
      passes.forEach((each, column) => {
        const x = column * step, wide = Math.max(1, step - (step > 4 ? 1 : 0));
        for (const request of each.waiting) {
          if (each.parts.some((part) => part.request === request)) continue;
          pen.fillStyle = colors.wait;
          pen.fillRect(x + step / 2 - 1, request * rowHeight + rowHeight / 2 - 1, 2, 2);
        }
        for (const part of each.parts) {
          const y = part.request * rowHeight + gap / 2, high = rowHeight - gap;
          pen.fillStyle = colors.waste;
          pen.fillRect(x, y, wide, high);
          const share = part.got_token ? part.useful / part.num_tokens : 0;
          pen.fillStyle = part.num_tokens > 1 ? colors.prompt : colors.token;
          pen.fillRect(x, y + high * (1 - share), wide, high * share);
        }
      });
    };
  }
})();
