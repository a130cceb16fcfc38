"use strict";
(() => {
  const rows = [...document.querySelectorAll("li")];
  const slider = document.getElementById("at"), play = document.getElementById("play"), shown = document.getElementById("shown");
  let timer = 0;
  const show = (at) => {
    rows.forEach((row, i) => {
      row.classList.toggle("later", i > at);
      row.classList.toggle("now", i === at && at < rows.length - 1);
    });
    shown.textContent = `${at + 1} of ${rows.length}`;
    slider.value = String(at);
  };
  const stop = () => { clearInterval(timer); timer = 0; play.textContent = "Play"; };
  const step = () => {
    const next = Number(slider.value) + 1;
    if (next >= rows.length) return stop();
    show(next);
    rows[next].scrollIntoView({ block: "nearest" });
  };
  slider.max = String(Math.max(0, rows.length - 1));
  slider.addEventListener("input", () => { stop(); show(Number(slider.value)); });
  play.addEventListener("click", () => {
    if (timer) return stop();
    if (Number(slider.value) >= rows.length - 1) show(0);
    timer = setInterval(step, 350);
    play.textContent = "Pause";
  });
  show(rows.length - 1);
})();
