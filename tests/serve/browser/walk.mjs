// Walks through the page as a curator does, in a real Chromium: node walk.mjs URL PICTURE OUT WIDTH HEIGHT
// Leaves a screenshot of each step, the downloaded TIFF and what was seen (seen.json) in OUT. Any error ends it.
import { writeFileSync, readFileSync } from "node:fs";
import chromium from "@sparticuz/chromium";
import { chromium as playwright } from "playwright-core";

const [url, picture, out, width, height] = process.argv.slice(2);
const browser = await playwright.launch({
  executablePath: await chromium.executablePath(),
  args: ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"],
});
const page = await browser.newPage({ viewport: { width: Number(width), height: Number(height) }, acceptDownloads: true });
const seen = { errors: [], shares: [], foreign: [], full: 0 };
page.on("pageerror", (error) => seen.errors.push(String(error)));
page.on("console", (message) => { if (message.type() === "error") seen.errors.push(message.text()); });
page.on("request", (request) => { if (!request.url().startsWith(url) && /^https?:/.test(request.url())) seen.foreign.push(request.url()); });
page.on("response", (response) => { // final tiles of the restored picture at full size
  const tile = response.url().match(/~restored~.*\/\d+,\d+,(\d+),\d+\/(\d+),\d+\/0\/default/);
  if (tile && tile[1] === tile[2] && /max-age/.test(response.headers()["cache-control"])) seen.full++;
});
let step = 0;
const shoot = (name) => page.screenshot({ path: `${out}/${++step}-${name}.png` });

try {
  await page.goto(url);
  const dropped = await page.evaluateHandle((base64) => {
    const bytes = Uint8Array.from(atob(base64), (char) => char.charCodeAt(0));
    const carried = new DataTransfer();
    carried.items.add(new File([bytes], "scan.png", { type: "image/png" }));
    return carried;
  }, readFileSync(picture).toString("base64"));
  await page.dispatchEvent("#drop", "drop", { dataTransfer: dropped });
  await page.waitForSelector("#paint:visible");
  await shoot("dropped");

  const paint = await (await page.$("#paint")).boundingBox();
  const at = (x, y) => [paint.x + paint.width * x, paint.y + paint.height * y];
  await page.mouse.move(...at(0.3, 0.2));
  await page.mouse.down();
  for (let part = 1; part <= 12; part++) await page.mouse.move(...at(0.3 + 0.03 * part, 0.2 + 0.03 * part));
  await page.mouse.up();
  await page.selectOption("#scale", "16");
  await page.waitForFunction(() => document.getElementById("size").textContent.includes("8192"));
  await shoot("painted");

  const started = Date.now();
  await page.click("#start");
  await page.waitForSelector("#show canvas", { timeout: 60000 });
  seen.shown_ms = Date.now() - started;
  const share = () => page.$eval("#progress", (bar) => bar.value);
  while ((seen.shares.at(-1) ?? 0) < 1) {
    const now = await share();
    if (now !== seen.shares.at(-1)) seen.shares.push(now);
    if (now > 0 && now < 1 && step === 2) await shoot("progress");
    await page.waitForTimeout(100);
  }
  await page.waitForFunction(() => document.getElementById("state").textContent.startsWith("Done"), null, { timeout: 60000 });
  await page.waitForTimeout(2000); // the tiles that are final come
  await page.evaluate(() => document.getElementById("show").scrollIntoView());
  await shoot("done");

  seen.zoom = await page.evaluate(async () => { // to 1:1, at the painted stroke
    const { viewer, items } = shown, item = items.restored;
    viewer.viewport.zoomTo(item.imageToViewportZoom(1), undefined, true);
    viewer.viewport.panTo(new OpenSeadragon.Point(0.45, 0.35), true);
    await new Promise((done) => setTimeout(done, 500));
    for (let wait = 0; wait < 100 && !item.getFullyLoaded(); wait++) await new Promise((done) => setTimeout(done, 100));
    return item.viewportToImageZoom(viewer.viewport.getZoom(true));
  });
  await shoot("full-size");

  const look = () => page.$eval("#show canvas", (canvas) => canvas.toDataURL());
  const before = await look();
  const slider = await (await page.$("#split")).boundingBox();
  await page.mouse.move(slider.x + slider.width / 2, slider.y + slider.height / 2);
  await page.mouse.down();
  await page.mouse.move(slider.x + slider.width / 5, slider.y + slider.height / 2, { steps: 10 });
  await page.mouse.up();
  await page.waitForTimeout(500);
  seen.slider = { value: await page.$eval("#split", (one) => Number(one.value)), changed: (await look()) !== before };
  await shoot("slider");
  for (const mode of ["sides", "difference"]) {
    await page.click(`[data-mode=${mode}]`);
    await page.waitForTimeout(2000);
    await shoot(mode);
  }

  const [download] = await Promise.all([page.waitForEvent("download", { timeout: 120000 }), page.click("#downloads a:first-child")]);
  await download.saveAs(`${out}/download.tif`);
  seen.download = download.suggestedFilename();
  seen.wide = await page.evaluate(() => document.documentElement.scrollWidth > document.documentElement.clientWidth);
} finally {
  writeFileSync(`${out}/seen.json`, JSON.stringify(seen));
  await browser.close();
}
