// llama.cpp (node-llama-cpp, prebuilt) on one file: prefill and decode rates, printed as one JSON object.
//
//   node bench/peers/llama_cpp.mjs MODEL.gguf [threads=2] [prompt=128,512] [decode=64] [runs=5]
//
// node-llama-cpp is looked up in target/peers (npm install --prefix target/peers --ignore-scripts node-llama-cpp@3).
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";
import path from "node:path";

const root = path.resolve(import.meta.dirname, "../..");
const require = createRequire(path.join(root, "target/peers/package.json"));
const { getLlama, LlamaLogLevel } = await import(pathToFileURL(require.resolve("node-llama-cpp")));

const [file, threads = "2", prompts = "128,512", decode = "64", runs = "5"] = process.argv.slice(2);
const median = (values) => values.sort((a, b) => a - b)[Math.floor(values.length / 2)];

const llama = await getLlama({ gpu: false, build: "never", logLevel: LlamaLogLevel.error, maxThreads: Number(threads) });
const began = performance.now();
const model = await llama.loadModel({ modelPath: file });
const load_ms = performance.now() - began;
const result = { engine: "llama.cpp", threads: Number(threads), load_ms, prefill: [], decode: {} };

for (const length of prompts.split(",").map(Number)) {
    const times = [];
    for (let run = 0; run < Number(runs); run++) {
        const context = await model.createContext({ contextSize: 1024, batchSize: 512, threads: Number(threads) });
        const sequence = context.getSequence();
        // The same ids as `stoker bench engine`: a fixed sequence over the vocabulary.
        const ids = Array.from({ length }, (_, i) => 100 + ((i * 7919) % 40000));
        const start = performance.now();
        for await (const _ of sequence.evaluate(ids, { temperature: 0 })) break;
        times.push(performance.now() - start);
        await context.dispose();
    }
    const ms = median(times);
    result.prefill.push({ tokens: length, ms, tokens_per_s: (length / ms) * 1e3 });
}

const rates = [];
for (let run = 0; run < Number(runs); run++) {
    const context = await model.createContext({ contextSize: 1024, threads: Number(threads) });
    const sequence = context.getSequence();
    let count = 0;
    let start = 0;
    for await (const _ of sequence.evaluate([1, 100, 200, 300], { temperature: 0, yieldEogToken: true })) {
        if (count++ === 0) start = performance.now();
        if (count > Number(decode)) break;
    }
    rates.push(((count - 1) / (performance.now() - start)) * 1e3);
    await context.dispose();
}
result.decode = { tokens: Number(decode), tokens_per_s: median(rates) };
console.log(JSON.stringify(result));
await model.dispose();
process.exit(0);
