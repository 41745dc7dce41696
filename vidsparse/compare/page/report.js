(() => {
  "use strict";

  const byId = (id) => document.getElementById(id);
  const data = JSON.parse(byId("data").textContent);
  const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  const show = (value, digits) => (value === null || value === undefined ? "-" : value.toFixed(digits));
  const make = (tag, text, parent) => {
    const element = document.createElement(tag);
    if (text !== undefined) element.textContent = text;
    if (parent) parent.append(element);
    return element;
  };
  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));

  // ---------------------------------------------------------------- charts

  const charts = new Map(); // element -> [build, chart]

  function chart(element, build) {
    const old = charts.get(element);
    if (old && old[1]) old[1].destroy();
    element.replaceChildren();
    charts.set(element, [build, build ? build(Math.max(240, element.clientWidth)) : null]);
  }

  const axis = (label, extra) => ({
    stroke: color("soft"),
    grid: { stroke: color("line"), width: 1 },
    ticks: { stroke: color("line"), width: 1 },
    font: "11px system-ui, sans-serif",
    labelFont: "11px system-ui, sans-serif",
    labelSize: 16,
    label,
    ...extra,
  });

  // As many digits as tell neighbouring ticks apart.
  const digits = (u, values) => {
    const gap = values.length > 1 ? Math.abs(values[1] - values[0]) : 1;
    return values.map((v) => v.toFixed(Math.max(0, Math.min(7, Math.ceil(-Math.log10(gap) - 1e-9)))));
  };

  const number = (digits) => (u, value) => show(value, digits);

  new ResizeObserver((entries) => {
    for (const { target } of entries) {
      const held = charts.get(target);
      if (held && held[1] && Math.abs(held[1].width - target.clientWidth) > 2) {
        held[1].setSize({ width: Math.max(240, target.clientWidth), height: held[1].height });
      }
    }
    drawHeat();
  }).observe(document.body);

  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    for (const [element, [build]] of [...charts]) chart(element, build);
    drawHeat();
    drawLegend();
  });

  // ---------------------------------------------------------------- tables

  function table(element, caption, heads, rows) {
    if (!rows.length) return;
    const about = make("p", caption); // no <caption>: it would be as wide as a table that scrolls
    about.className = "note";
    element.parentElement.before(about);
    element.setAttribute("aria-label", caption);
    const head = make("tr", undefined, make("thead", undefined, element));
    for (const name of heads) make("th", name, head).scope = "col";
    const body = make("tbody", undefined, element);
    for (const cells of rows) {
      const line = make("tr", undefined, body);
      for (const cell of cells) make("td", cell, line);
    }
  }

  byId("conditions").textContent = data.conditions;
  for (const text of [...data.missed.map((why) => `threshold missed: ${why}`), ...data.warnings]) {
    make("li", text, byId("warnings"));
  }
  const times = (value) => (value === null ? "-" : `${value.toFixed(2)}x`);
  table(
    byId("arms"),
    "Against the reference; PSNR of the MSE pooled over frames, means over clips",
    ["arm", "clips", "speed-up", "PSNR dB", "worst", "SSIM", "worst", "density", "of all calls"],
    data.arms.map((arm) => [
      arm.arm + (arm.lossy ? " (lossy files)" : ""),
      String(arm.clips),
      times(arm.speedup),
      arm.identical_clips === arm.clips ? "identical" : show(arm.psnr_pool, 2),
      show(arm.psnr_pool_worst, 2),
      show(arm.ssim, 4),
      show(arm.ssim_worst, 4),
      show(arm.density, 3),
      show(arm.attention_density, 3),
    ]),
  );
  table(
    byId("pairings"),
    "Arm against arm, clip by clip; 95 % bootstrap interval of the mean difference",
    ["A against B", "measure", "mean A - B", "interval", "wins, ties, losses", "better"],
    data.pairings.map((pair) => [
      `${pair.a} against ${pair.b}`,
      pair.measure,
      pair.mean.toPrecision(3),
      pair.low === null ? "too few clips" : `${pair.low.toPrecision(3)} .. ${pair.high.toPrecision(3)}`,
      `${pair.wins}, ${pair.ties}, ${pair.losses}`,
      pair.better ?? "-",
    ]),
  );

  function pareto() {
    const points = data.arms.filter((arm) => arm.speedup !== null && arm.psnr_pool !== null && !arm.lossy);
    byId("pareto").hidden = points.length < 2;
    if (points.length < 2) return;
    points.sort((a, b) => a.speedup - b.speedup);
    const xs = points.map((arm) => arm.speedup);
    const front = points.map((arm) => (arm.on_front ? arm.psnr_pool : null));
    const low = points.map((arm) => arm.psnr_low);
    const high = points.map((arm) => arm.psnr_high);
    const ys = points.flatMap((arm) => [arm.psnr_pool, arm.psnr_low ?? arm.psnr_pool, arm.psnr_high ?? arm.psnr_pool]);
    const pad = (values, share) => {
      const span = Math.max(...values) - Math.min(...values) || 1;
      return [Math.min(...values) - share * span, Math.max(...values) + share * span];
    };
    chart(byId("pareto"), (width) => new uPlot(
      {
        width: Math.min(width, 720),
        height: 300,
        title: "Speed-up against PSNR; the line joins arms that no other beats in both",
        scales: { x: { time: false, range: () => pad(xs, 0.12) }, y: { range: () => pad(ys, 0.15) } },
        axes: [axis("speed-up", { values: (u, v) => v.map((x) => `${+x.toFixed(2)}x`) }), axis("PSNR dB", { size: 54 })],
        legend: { show: false },
        cursor: { show: false },
        series: [
          {},
          { label: "front", stroke: color("soft"), dash: [4, 4], spanGaps: true, points: { show: false } },
          { label: "arms", paths: () => null, stroke: color("blue"), points: { show: true, size: 9, fill: color("blue") } },
        ],
        hooks: {
          draw: [
            (u) => {
              const { ctx } = u;
              ctx.save();
              ctx.strokeStyle = ctx.fillStyle = color("ink");
              ctx.lineWidth = devicePixelRatio;
              ctx.font = `${12 * devicePixelRatio}px system-ui, sans-serif`;
              points.forEach((arm, n) => {
                const x = u.valToPos(xs[n], "x", true);
                const y = u.valToPos(arm.psnr_pool, "y", true);
                if (low[n] !== null && high[n] !== null) {
                  ctx.beginPath();
                  ctx.moveTo(x, u.valToPos(low[n], "y", true));
                  ctx.lineTo(x, u.valToPos(high[n], "y", true));
                  ctx.stroke();
                }
                const left = x > u.bbox.left + 0.8 * u.bbox.width;
                ctx.textAlign = left ? "right" : "left";
                ctx.fillText(arm.arm, x + (left ? -9 : 9) * devicePixelRatio, y - 7 * devicePixelRatio);
              });
              ctx.restore();
            },
          ],
        },
      },
      [xs, front, points.map((arm) => arm.psnr_pool)],
      byId("pareto"),
    ));
  }

  // ---------------------------------------------------------------- player

  const video = document.createElement("video");
  video.muted = true;
  video.playsInline = true;
  video.preload = "auto";
  const views = ["reference", "test", "difference"].map((name) => byId(`view-${name}`));
  const wipeView = byId("view-wipe");
  const stage = byId("stage");
  let clip = null;
  let frame = 0;
  let url = null;

  function draw() {
    if (!clip.video || video.readyState < 2) return;
    const { width, height } = clip.video;
    views.forEach((view, n) => {
      view.getContext("2d").drawImage(video, 0, n * height, width, height, 0, 0, width, height);
    });
    const context = wipeView.getContext("2d");
    const cut = Math.round((width * byId("wipe").value) / 100);
    if (cut > 0) context.drawImage(video, 0, 0, cut, height, 0, 0, cut, height);
    if (cut < width) context.drawImage(video, cut, height, width - cut, height, cut, 0, width - cut, height);
    context.fillStyle = "#ffffff";
    context.fillRect(cut - 1, 0, 2, height);
  }

  function at(number) {
    frame = Math.min(clip.frames - 1, Math.max(0, number));
    stage.dataset.frame = String(frame);
    byId("seek").value = String(frame);
    byId("time").textContent = `${frame} of ${clip.frames - 1}, ${(frame / clip.fps).toFixed(2)} s`;
    for (const id of ["chart-psnr", "chart-ssim", "chart-flicker"]) {
      const held = charts.get(byId(id));
      if (held && held[1]) held[1].redraw(false);
    }
  }

  function seek(number) {
    const wanted = Math.min(clip.frames - 1, Math.max(0, number));
    if (!clip.video) return at(wanted);
    if (wanted !== frame) at(wanted);
    video.currentTime = (wanted + 0.5) / clip.fps;
  }

  function presented(time) {
    const now = Math.round(time * clip.fps);
    draw();
    if (video.seeking) return;
    at(now);
    const [start, stop] = clip.worst_second ?? [0, clip.frames];
    if (byId("loop").checked && !video.paused && (now >= stop - 1 || now < start)) seek(start);
  }

  if ("requestVideoFrameCallback" in HTMLVideoElement.prototype) {
    const next = (now, facts) => {
      presented(facts.mediaTime);
      video.requestVideoFrameCallback(next);
    };
    video.requestVideoFrameCallback(next);
  } else {
    video.addEventListener("timeupdate", () => presented(Math.floor(video.currentTime * clip.fps + 1e-3) / clip.fps));
  }
  video.addEventListener("seeked", () => {
    draw();
    at(Math.floor(video.currentTime * clip.fps + 1e-3));
  });
  video.addEventListener("loadeddata", draw);
  for (const name of ["play", "pause", "ended"]) {
    video.addEventListener(name, () => {
      const running = !video.paused && !video.ended;
      byId("play").textContent = running ? "Pause" : "Play";
      byId("play").setAttribute("aria-pressed", String(running));
      if (name !== "ended") return;
      draw();
      at(clip.frames - 1);
      if (byId("loop").checked) {
        seek((clip.worst_second ?? [0])[0]);
        run();
      }
    });
  }

  function toggle() {
    if (!clip.video) return;
    if (!video.paused && !video.ended) return video.pause();
    if (byId("loop").checked && clip.worst_second) seek(clip.worst_second[0]);
    else if (frame >= clip.frames - 1) seek(0);
    run();
  }

  function run() {
    video.playbackRate = Number(byId("speed").value);
    video.play().catch(() => {}); // a pause that comes at once ends it
  }

  function step(by) {
    video.pause();
    seek(frame + by);
  }

  byId("play").addEventListener("click", toggle);
  byId("back").addEventListener("click", () => step(-1));
  byId("forward").addEventListener("click", () => step(1));
  byId("seek").addEventListener("input", (event) => {
    video.pause();
    seek(Number(event.target.value));
  });
  byId("speed").addEventListener("change", (event) => {
    video.playbackRate = Number(event.target.value);
  });
  byId("worst").addEventListener("click", () => {
    video.pause();
    seek(clip.worst_frame);
  });
  byId("wipe").addEventListener("input", draw);
  byId("wipe-on").addEventListener("change", (event) => {
    stage.classList.toggle("wiping", event.target.checked);
    byId("controls").classList.toggle("wiping-on", event.target.checked);
    draw();
  });
  document.addEventListener("keydown", (event) => {
    const typing = event.target.closest("input, select, button, summary, textarea, #heat");
    if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
    const acts = { " ": toggle, ArrowLeft: () => step(-1), ArrowRight: () => step(1), w: () => byId("worst").click() };
    const act = acts[event.key.length === 1 ? event.key.toLowerCase() : event.key];
    if (act) {
      event.preventDefault();
      act();
    }
  });

  function curves() {
    const xs = Array.from({ length: clip.frames }, (_, n) => n);
    const line = (label, name, digits) => ({
      label,
      stroke: color(name),
      width: 1.5,
      points: { show: clip.frames < 2 },
      value: number(digits),
    });
    const one = (id, title, series, values) =>
      chart(byId(id), (width) => new uPlot(
        {
          width,
          height: 190,
          title,
          scales: { x: { time: false } },
          axes: [axis("frame", { incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000] }), axis(undefined, { size: 56, values: digits })],
          cursor: { drag: { x: false, y: false }, sync: { key: "frames" } },
          series: [{ label: "frame" }, ...series],
          hooks: {
            ready: [
              (u) => u.over.addEventListener("click", () => {
                if (u.cursor.idx !== null && u.cursor.idx !== undefined) {
                  video.pause();
                  seek(u.cursor.idx);
                }
              }),
            ],
            draw: [
              (u) => {
                const mark = (at, name, dash) => {
                  const x = u.valToPos(at, "x", true);
                  u.ctx.save();
                  u.ctx.strokeStyle = color(name);
                  u.ctx.lineWidth = 1.5 * devicePixelRatio;
                  u.ctx.setLineDash(dash);
                  u.ctx.beginPath();
                  u.ctx.moveTo(x, u.bbox.top);
                  u.ctx.lineTo(x, u.bbox.top + u.bbox.height);
                  u.ctx.stroke();
                  u.ctx.restore();
                };
                mark(clip.worst_frame, "orange", [3 * devicePixelRatio, 3 * devicePixelRatio]);
                mark(frame, "ink", []);
              },
            ],
          },
        },
        [xs, ...values],
        byId(id),
      ));
    const { psnr, ssim, flick_ref, flick_test } = clip.series;
    one("chart-psnr", "PSNR dB; dashed: the worst frame", [line("PSNR", "blue", 2)], [psnr]);
    one("chart-ssim", "SSIM", [line("SSIM", "violet", 4)], [ssim]);
    one(
      "chart-flicker",
      "Change to the next frame, 8-bit steps",
      [line("reference", "soft", 3), line("test", "green", 3)],
      [flick_ref, flick_test],
    );
  }

  // ---------------------------------------------------------------- attention

  const heat = byId("heat");
  const marked = { step: 0, layer: 0 };
  let group = null;

  const shades = ["#b9bcc4", "#8f96a3", "#c9a66b", "#a58cc0", "#c48787", "#7fae96"];

  function fillOf(density, reason) {
    if (reason === 255) return "transparent";
    if (reason > 0) return shades[(reason - 1) % shades.length];
    const share = Math.sqrt(Math.min(1, density));
    const mix = (low, high) => Math.round(low + (high - low) * share);
    return `rgb(${mix(16, 190)}, ${mix(60, 216)}, ${mix(120, 240)})`;
  }

  function cellOf(step, layer) {
    const { heads } = group;
    const place = step * clip.trace.layers + layer;
    const densities = Array.from(group.density.subarray(place * heads, (place + 1) * heads), (v) => v / 255);
    const mean = densities.reduce((sum, v) => sum + v, 0) / Math.max(1, heads);
    return { reason: group.reason[place], densities, mean };
  }

  function layout() {
    const { steps, layers } = clip.trace;
    const left = 40;
    const bottom = 30;
    const width = Math.max(200, heat.clientWidth);
    const cellWidth = (width - left - 4) / steps;
    const cellHeight = Math.max(4, Math.min(18, 420 / layers));
    return { left, bottom, width, height: layers * cellHeight + bottom, cellWidth, cellHeight, steps, layers };
  }

  function drawHeat() {
    if (!clip || !clip.trace || !group) return;
    const place = layout();
    const ratio = devicePixelRatio || 1;
    heat.style.height = `${place.height}px`;
    heat.width = Math.round(place.width * ratio);
    heat.height = Math.round(place.height * ratio);
    const context = heat.getContext("2d");
    context.scale(ratio, ratio);
    for (let step = 0; step < place.steps; step += 1) {
      for (let layer = 0; layer < place.layers; layer += 1) {
        const { reason, mean } = cellOf(step, layer);
        const x = place.left + step * place.cellWidth;
        const y = layer * place.cellHeight;
        const [w, h] = [Math.max(1, place.cellWidth - 1), Math.max(1, place.cellHeight - 1)];
        context.fillStyle = fillOf(mean, reason);
        context.fillRect(x, y, w, h);
        if (reason > 0 && reason < 255) {
          context.save();
          context.beginPath();
          context.rect(x, y, w, h);
          context.clip();
          context.strokeStyle = "rgba(0, 0, 0, 0.28)";
          for (let shift = -h; shift < w; shift += 5) {
            context.beginPath();
            context.moveTo(x + shift, y + h);
            context.lineTo(x + shift + h, y);
            context.stroke();
          }
          context.restore();
        }
      }
    }
    context.strokeStyle = color("orange");
    context.lineWidth = 2;
    context.strokeRect(
      place.left + marked.step * place.cellWidth,
      marked.layer * place.cellHeight,
      place.cellWidth - 1,
      place.cellHeight - 1,
    );
    context.fillStyle = color("soft");
    context.font = "11px system-ui, sans-serif";
    context.textAlign = "right";
    const every = Math.max(1, Math.ceil(14 / place.cellHeight));
    for (let layer = 0; layer < place.layers; layer += every) {
      context.fillText(String(layer), place.left - 6, (layer + 0.5) * place.cellHeight + 4);
    }
    context.textAlign = "center";
    const skip = Math.max(1, Math.ceil(26 / place.cellWidth));
    for (let step = 0; step < place.steps; step += skip) {
      context.fillText(String(step), place.left + (step + 0.5) * place.cellWidth, place.height - 16);
    }
    context.fillText("step", place.left + (place.width - place.left) / 2, place.height - 3);
    context.save();
    context.translate(10, (place.layers * place.cellHeight) / 2);
    context.rotate(-Math.PI / 2);
    context.fillText("layer", 0, 0);
    context.restore();
  }

  function tell() {
    const panel = byId("cell");
    panel.replaceChildren();
    const { reason, densities, mean } = cellOf(marked.step, marked.layer);
    make("strong", `step ${marked.step}, layer ${marked.layer}`, panel);
    if (reason === 255) return void make("p", "no call", panel);
    if (reason > 0) return void make("p", `dense: ${clip.trace.reasons[reason]}`, panel);
    make("p", `density ${mean.toFixed(3)}, mean over ${densities.length} heads`, panel);
    densities.forEach((value, head) => {
      const bar = make("div", undefined, panel);
      bar.className = "bar";
      make("span", `head ${head}`, bar);
      const room = make("span", undefined, bar);
      make("i", undefined, room).style.width = `${Math.max(1, 100 * value)}%`;
      make("span", value.toFixed(3), bar);
    });
  }

  function mark(step, layer) {
    marked.step = Math.min(clip.trace.steps - 1, Math.max(0, step));
    marked.layer = Math.min(clip.trace.layers - 1, Math.max(0, layer));
    drawHeat();
    tell();
  }

  heat.addEventListener("mousemove", (event) => {
    if (!clip.trace) return;
    const place = layout();
    const step = Math.floor((event.offsetX - place.left) / place.cellWidth);
    const layer = Math.floor(event.offsetY / place.cellHeight);
    if (step >= 0 && step < place.steps && layer >= 0 && layer < place.layers) mark(step, layer);
  });
  heat.addEventListener("keydown", (event) => {
    const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    const by = moves[event.key];
    if (!by || !clip.trace) return;
    event.preventDefault();
    mark(marked.step + by[0], marked.layer + by[1]);
  });

  function drawLegend() {
    const legend = byId("legend");
    legend.replaceChildren();
    if (!clip || !clip.trace || !group) return;
    const entry = (fill, text) => {
      const item = make("span", undefined, legend);
      make("b", undefined, item).style.background = fill;
      item.append(text);
    };
    for (const density of [0.05, 0.25, 0.5, 1]) entry(fillOf(density, 0), density.toFixed(2));
    const seen = new Set(group.reason);
    clip.trace.reasons.forEach((text, code) => {
      if (code > 0 && seen.has(code)) entry(fillOf(1, code), `dense: ${text}`);
    });
  }

  function choose(number) {
    const raw = clip.trace.groups[number];
    group = { heads: raw.heads, density: bytes(raw.density), reason: bytes(raw.reason) };
    mark(marked.step, marked.layer);
    drawLegend();
  }

  const stageColors = ["orange", "violet", "green", "blue", "soft"];

  function timeChart() {
    const { stages } = clip.time;
    const steps = Array.from({ length: stages[0].seconds.length }, (_, n) => n);
    const sums = [];
    stages.forEach(({ seconds }, n) => sums.push(seconds.map((s, i) => s + (n ? sums[n - 1][i] : 0))));
    const paths = uPlot.paths.bars({ size: [0.8, 60] });
    const shown = stages.map((stage, n) => ({ ...stage, sum: sums[n], n })).reverse();
    chart(byId("chart-time"), (width) => new uPlot(
      {
        width,
        height: 220,
        title: "Seconds of every step",
        scales: { x: { time: false, range: (u, low, high) => [low - 0.6, high + 0.6] }, y: { range: (u, low, high) => [0, high * 1.05 || 1] } },
        axes: [axis("step", { incrs: [1, 2, 5, 10, 20, 50, 100] }), axis("s", { size: 50 })],
        cursor: { drag: { x: false, y: false } },
        series: [
          { label: "step" },
          ...shown.map((stage) => ({
            label: stage.name,
            paths,
            points: { show: false },
            stroke: color(stageColors[stage.n % stageColors.length]),
            fill: color(stageColors[stage.n % stageColors.length]),
            value: (u, v, s, i) => (i === null || i === undefined ? "-" : `${stages[stage.n].seconds[i].toFixed(3)} s`),
          })),
        ],
      },
      [steps, ...shown.map((stage) => stage.sum)],
      byId("chart-time"),
    ));
  }

  function amdahl() {
    const box = byId("amdahl");
    box.replaceChildren();
    const { reference, predicted, measured } = clip.time;
    const bars = [["reference", reference], ["predicted", predicted], ["measured", measured]].filter(([, s]) => s !== null);
    const most = Math.max(...bars.map(([, s]) => s));
    for (const [name, seconds] of bars) {
      const bar = make("div", undefined, box);
      bar.className = "bar";
      make("span", name, bar);
      make("i", undefined, make("span", undefined, bar)).style.width = `${(100 * seconds) / most}%`;
      const gain = reference && name !== "reference" ? `, ${(reference / seconds).toFixed(2)}x` : "";
      make("span", `${seconds.toFixed(2)} s${gain}`, bar);
    }
    if (predicted !== null) {
      make("p", "Predicted: what is not attention as measured, and the attention of the reference times the density "
        + "of all calls. The gap to the measured bar is what estimating, selecting and permuting cost, or gain.", box).className = "note";
    }
  }

  // ---------------------------------------------------------------- one clip

  function open(number) {
    clip = data.clips[number];
    video.pause();
    if (url) URL.revokeObjectURL(url);
    url = null;
    byId("prompt").textContent = clip.prompt ?? "";
    byId("test-name").textContent = clip.arm;
    byId("clip-figures").textContent = clip.figures;
    const held = clip.video !== null;
    stage.hidden = !held;
    byId("no-video").hidden = held;
    byId("no-video").textContent = held ? "" : clip.no_video;
    for (const id of ["play", "speed", "loop", "wipe-on"]) byId(id).disabled = !held;
    byId("seek").max = String(clip.frames - 1);
    if (held) {
      for (const view of [...views, wipeView]) [view.width, view.height] = [clip.video.width, clip.video.height];
      url = URL.createObjectURL(new Blob([bytes(byId(clip.video.id).textContent)], { type: "video/mp4" }));
      video.src = url;
    }
    frame = -1;
    curves();
    at(0);
    byId("attention").hidden = !clip.trace && !clip.time;
    byId("branch").replaceChildren();
    group = null;
    if (clip.trace) {
      clip.trace.groups.forEach(({ name }, n) => (make("option", name, byId("branch")).value = String(n)));
      marked.step = marked.layer = 0;
      choose(0);
    }
    heat.parentElement.hidden = !clip.trace;
    byId("layer-of").hidden = !clip.trace || clip.trace.groups.length < 2;
    if (clip.time) {
      timeChart();
      amdahl();
    } else {
      chart(byId("chart-time"), null);
      byId("amdahl").replaceChildren();
    }
  }

  byId("branch").addEventListener("change", (event) => choose(Number(event.target.value)));
  data.clips.forEach((one, n) => (make("option", `${one.arm}: ${one.clip}`, byId("clip")).value = String(n)));
  byId("clip").addEventListener("change", (event) => open(Number(event.target.value)));

  // ---------------------------------------------------------------- again

  byId("command").textContent = data.command;
  byId("figures").textContent = data.figures;
  for (const [name, value] of Object.entries(data.protocol)) {
    make("dt", name.replaceAll("_", " "), byId("protocol"));
    make("dd", typeof value === "object" ? JSON.stringify(value) : String(value), byId("protocol"));
  }
  for (const button of document.querySelectorAll("[data-copy]")) {
    button.addEventListener("click", async () => {
      const source = byId(button.dataset.copy);
      try {
        await navigator.clipboard.writeText(source.textContent);
        byId("copied").textContent = "copied";
      } catch {
        source.closest("details")?.setAttribute("open", "");
        getSelection().selectAllChildren(source);
        byId("copied").textContent = "selected: copy it with the keyboard";
      }
    });
  }

  pareto();
  if (data.clips.length) {
    const seen = Math.max(0, data.clips.findIndex((one) => one.video)); // of many clips few have one
    byId("clip").value = String(seen);
    open(seen);
  }
})();
