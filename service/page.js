// Puts what is new on the page, every three seconds, unless nobody looks or somebody is selecting text.
const main = document.querySelector("main");
const live = location.origin + location.pathname + "live";
async function renew() {
  if (!document.hidden && !String(getSelection())) {
    let answer = null;
    try { answer = await fetch(live); } catch { /* told below */ }
    if (answer?.ok) main.innerHTML = await answer.text();
    document.getElementById("stale").hidden = Boolean(answer?.ok);
  }
  setTimeout(renew, 3000);
}
setTimeout(renew, 3000);
