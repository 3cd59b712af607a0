// A candidate of bench_quantization.py: chatglm.cpp (0.4.x sources) behind the same few words on stdin and stdout.
//   prefill N -> seconds;  decode N -> [seconds];  memory -> peak bytes. The first line of JSON tells of the loading.
// Build: README.md.  Run: bench_quantization.py does; by hand: echo "prefill 32" | ./chatglm_cpp_bench MODEL.bin
#include "chatglm.h"

#include <sys/resource.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <string>
#include <vector>

static double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

int main(int argc, char **argv) {
    if (argc != 2) {
        fprintf(stderr, "usage: %s MODEL.bin\n", argv[0]);
        return 2;
    }
    const int most_tokens = 2048;
    double start = now();
    chatglm::Pipeline pipeline(argv[1], most_tokens);
    double loaded = now() - start;

    const chatglm::GenerationConfig greedy(most_tokens, -1, most_tokens, false);
    std::vector<int> ids;
    int context = 0; // of the prompt; ids grows behind it
    auto step = [&](int past) {
        double begin = now();
        int id = pipeline.model->generate_next_token(ids, std::nullopt, greedy, past, context);
        double seconds = now() - begin;
        ids.push_back(id);
        return seconds;
    };
    auto prefill = [&](int length) {
        context = length;
        ids.clear();
        srand(length);
        while ((int)ids.size() < length - 2)
            ids.push_back(10 + rand() % 120000);
        ids.push_back(130001); // [gMASK] <sop>
        ids.push_back(130004);
        return step(0);
    };

    prefill(32);
    double first_token = now() - start;
    std::ifstream file(argv[1], std::ios::ate | std::ios::binary);
    const auto &config = pipeline.model->config;
    // The head shares the matrix of the embedding, so a step reads the whole file; keys and values are float16.
    printf("{\"load_s\": %f, \"first_token_s\": %f, \"weight_bytes\": %lld, \"cache_bytes\": %d, \"kernels\": \"ggml\"}\n",
           loaded, first_token, (long long)file.tellg(), 2 * 2 * config.num_hidden_layers * config.hidden_size);
    fflush(stdout);

    std::string request;
    while (std::cin >> request) {
        int number = 0;
        if (request == "memory") {
            rusage usage;
            getrusage(RUSAGE_SELF, &usage);
            printf("%lld\n", usage.ru_maxrss * 1024LL);
        } else if (request == "prefill" && std::cin >> number) {
            printf("%f\n", prefill(number));
        } else if (request == "decode" && std::cin >> number) {
            for (int i = 0; i < number; i++)
                printf("%s%f", i ? ", " : "[", step((int)ids.size() - 1));
            printf("]\n");
        } else {
            fprintf(stderr, "unknown request %s\n", request.c_str());
            return 2;
        }
        fflush(stdout);
    }
}
