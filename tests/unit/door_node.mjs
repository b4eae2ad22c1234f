// What a program in JavaScript does with OpenAI's own client: create, poll, content. Prints what it got as JSON.
import { createHash } from "node:crypto";
import { createRequire } from "node:module";

const [folder, baseURL, prompt, apiKey = "none"] = process.argv.slice(2);
const { OpenAI } = createRequire(`${folder}/`)("openai");
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });

const begun = await client.videos.create({ prompt, seconds: "1", size: "48x32" });
let video = begun;
while (video.status === "queued" || video.status === "in_progress") {
  await new Promise((resolve) => setTimeout(resolve, 50));
  video = await client.videos.retrieve(video.id);
}
const content = Buffer.from(await (await client.videos.downloadContent(video.id)).arrayBuffer());
const refused = await client.videos.retrieve("no-such-video").catch((error) => error);
console.log(
  JSON.stringify({
    begun: begun.status,
    video,
    content: createHash("sha256").update(content).digest("hex"),
    refused: [refused.status, refused.code],
  }),
);
