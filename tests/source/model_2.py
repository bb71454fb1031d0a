import torch.nn as nn
import torch.nn.functional as F


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        # Input block
        self.conv1 = nn.Conv2d(1, 16, 3, bias=False)  # 28 -> 26
        self.bn1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 32, 3, bias=False)  # 26 -> 24
        self.bn2 = nn.BatchNorm2d(32)
        self.conv3 = nn.Conv2d(32, 64, 3, bias=False)  # 24 -> 22
        self.bn3 = nn.BatchNorm2d(64)

        # Transition block
        self.pool1 = nn.MaxPool2d(2, 2)  # 22 -> 11
        self.conv4 = nn.Conv2d(64, 32, 1, bias=False)
        self.bn4 = nn.BatchNorm2d(32)

        self.conv5 = nn.Conv2d(32, 32, 3, bias=False)  # 11 -> 9
        self.bn5 = nn.BatchNorm2d(32)
        self.conv6 = nn.Conv2d(32, 32, 3, bias=False)  # 9 -> 7
        self.bn6 = nn.BatchNorm2d(32)

        # Output block
        self.conv7 = nn.Conv2d(32, 10, 1, bias=False)
        self.bn7 = nn.BatchNorm2d(10)
        self.conv8 = nn.Conv2d(10, 10, 7, bias=False)  # 7 -> 1

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.relu(self.bn3(self.conv3(x)))
        x = self.pool1(x)
        x = F.relu(self.bn4(self.conv4(x)))
        x = F.relu(self.bn6(self.conv6(F.relu(self.bn5(self.conv5(x))))))
        x = F.relu(self.bn7(self.conv7(x)))
        x = self.conv8(x)  # never a ReLU on the last layer
        x = x.view(-1, 10)
        return F.log_softmax(x, dim=-1)
